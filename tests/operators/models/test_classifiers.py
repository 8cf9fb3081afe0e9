"""Encoders with a head for labels in `tune`, `evaluate`, `merge` and `gate`."""

import json
import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lfm.errors import UnknownName
from lfm.merging.linear import Linear
from lfm.merging.task_arithmetic import TaskArithmetic
from lfm.tuning.full import Full
from lfm.tuning.linear_probe import LinearProbe
from lfm.tuning.lora import LoRA
from operators.artifact import Adapter, Dataset, Model
from operators.base import Resources
from operators.data.batches import IGNORED, on_device
from operators.data.row_files import DatasetError
from operators.evaluation import evaluate
from operators.gating import Requirement, compared, holds
from operators.merges.experts import MergeError
from operators.merging import merge
from operators.models.classifiers import check, labels_of, load, load_tokenizer, rows_of, told_of
from operators.models.language_models import UnsupportedModel, architecture_of
from operators.training import Training
from operators.tuning import tune
from tests.operators import small

pytestmark = pytest.mark.slow

LABELS = ("animal", "other", "place")
TRAINING = Training(max_steps=25, batch_size=9, micro_batch_size=4, length=16, learning_rate=1e-2, seed=1)
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def data(tmp_path):
    return small.labelled(tmp_path / "labelled.jsonl")


def whole_names(folder):
    return set(load_file(folder / "model.safetensors"))


def rows_in(dataset):
    return [json.loads(line) for line in dataset.path.read_text().splitlines()]


def logits_alone(folder, texts):
    """What transformers tells of each text, one by one, without padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack([model(**tokenizer(t, return_tensors="pt")).logits[0].double() for t in texts])


def test_an_encoder_learns_the_labels_of_its_data_and_knows_them_afterwards(tmp_path, data):
    work = small.Work(tmp_path / "work")
    encoder = small.encoder(tmp_path / "encoder", **CALM)
    assert (architecture_of(encoder.path), labels_of(encoder.path)) == ("encoder", ())
    made = tune.body(
        work,
        model=encoder,
        data=data,
        held_out=data,
        method=Full(),
        training=replace(TRAINING, learning_rate=3e-2, validate_every=25),
    )
    assert type(made) is Model
    assert architecture_of(made.path) == "classifier"
    assert json.loads((made.path / "config.json").read_text())["id2label"] == {str(i): v for i, v in enumerate(LABELS)}
    assert labels_of(made.path) == LABELS
    assert (made.about["rows"], made.about["loss_tokens"]) == (18, 25 * 9)
    said = logits_alone(made.path, [r["text"] for r in rows_in(data)]).argmax(1).tolist()
    assert [LABELS[i] for i in said] == [r["label"] for r in rows_in(data)]
    assert work.curve("held_out_loss")[0] < 0.1 < work.curve()[0]


def test_the_loss_of_a_step_is_the_mean_cross_entropy_of_each_text_alone(tmp_path, data):
    model, work = small.classifier(tmp_path / "model", **CALM), small.Work(tmp_path / "work")
    tune.body(
        work,
        model=model,
        data=data,
        held_out=None,
        method=Full(),
        training=replace(TRAINING, max_steps=1, batch_size=18),
    )
    shares = logits_alone(model.path, [r["text"] for r in rows_in(data)]).log_softmax(-1)
    right = [LABELS.index(r["label"]) for r in rows_in(data)]
    expected = -sum(shares[i, k].item() for i, k in enumerate(right)) / len(right)
    assert work.curve()[0] == pytest.approx(expected, rel=1e-5)


def test_how_rows_go_through_in_parts_changes_no_loss_and_no_gradient(tmp_path, data):
    model, told = small.classifier(tmp_path / "model", **CALM), []
    for micro in (1, 4, None):
        work = small.Work(tmp_path / f"work-{micro}")
        training = replace(TRAINING, max_steps=3, micro_batch_size=micro)
        tune.body(work, model=model, data=data, held_out=None, method=Full(), training=training)
        told.append([*work.curve(), *work.curve("gradient_norm")])
    assert told[0] == pytest.approx(told[2], rel=1e-4)
    assert told[1] == pytest.approx(told[2], rel=1e-4)


def test_a_classifier_keeps_its_labels_and_refuses_others_by_name(tmp_path, data):
    model = small.classifier(tmp_path / "model", ("place", "animal", "other"))
    made = tune.body(
        small.Work(tmp_path / "work"), model=model, data=data, held_out=None, method=Full(), training=TRAINING
    )
    assert labels_of(made.path) == ("place", "animal", "other")
    few = small.classifier(tmp_path / "few", ("animal", "others"))
    with pytest.raises(UnknownName, match=r"label of the model .* 'other'\. Did you mean 'others'"):
        tune.body(small.Work(tmp_path / "w"), model=few, data=data, held_out=None, method=Full(), training=TRAINING)
    with pytest.raises(UnknownName, match="'other'"):
        evaluate.body(small.Work(tmp_path / "v"), model=few, data={"set": data}, length=16)


def test_one_label_alone_is_nothing_to_learn(tmp_path):
    data = small.labelled(tmp_path / "one.jsonl", labels=("animal",))
    encoder = small.encoder(tmp_path / "encoder")
    with pytest.raises(DatasetError, match="has the label 'animal' alone, expected at least two"):
        tune.body(small.Work(tmp_path / "w"), model=encoder, data=data, held_out=None, method=Full(), training=TRAINING)


def test_a_probe_moves_the_head_alone(tmp_path, data):
    model = small.classifier(tmp_path / "model")
    made = tune.body(
        small.Work(tmp_path / "work"), model=model, data=data, held_out=None, method=LinearProbe(), training=TRAINING
    )
    before, after = (load_file(m.path / "model.safetensors") for m in (model, made))
    assert before.keys() == after.keys()
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_an_adapter_keeps_the_head_and_is_what_peft_loads(tmp_path, data, kind):
    import peft

    sizes = {
        "bert": {},
        "roberta": {"pad_token_id": 0},
        "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    }
    torch.manual_seed(0)
    config = small.config(
        kind, id2label=dict(enumerate(LABELS)), label2id={v: i for i, v in enumerate(LABELS)}, **sizes[kind]
    )
    folder = tmp_path / "model"
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    small.tokenizer().save_pretrained(folder)
    base = Model(str(folder), "b" * 64)
    made = tune.body(
        small.Work(tmp_path / "work"), model=base, data=data, held_out=None, method=LoRA(rank=2), training=TRAINING
    )
    assert type(made) is Adapter
    learnt = load_file(made.path / "adapter_model.safetensors")
    assert min(value.abs().max() for name, value in learnt.items() if "lora_B" in name) > 1e-3
    heads = {name for name in learnt if "lora" not in name}
    assert heads == {f"base_model.model.{n}" for n in whole_names(folder) if "classifier" in n}
    about = evaluate.body(small.Work(tmp_path / "v"), model=made, base=base, data={"set": data}, length=16).about
    whole = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(folder), made.path
    ).merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    small.tokenizer().save_pretrained(tmp_path / "whole")
    shares = logits_alone(tmp_path / "whole", [r["text"] for r in rows_in(data)]).log_softmax(-1)
    losses = [-shares[i, LABELS.index(r["label"])].item() for i, r in enumerate(rows_in(data))]
    assert about["sets"]["set"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    merged = merge.body(small.Work(tmp_path / "m"), base=base, experts=[made], method=Linear())
    for name, value in load_file(merged.path / "model.safetensors").items():
        torch.testing.assert_close(value, whole.state_dict()[name])


def test_evaluate_tells_of_each_text_what_it_is_taken_for(tmp_path, data):
    model = small.classifier(tmp_path / "model")
    shares = logits_alone(model.path, [r["text"] for r in rows_in(data)]).log_softmax(-1)
    found = []
    for size in (1, 5, 100):
        work = small.Work(tmp_path / f"work-{size}")
        made = evaluate.body(work, model=model, data={"set": data}, length=16, batch_size=size, max_documents=17)
        found.append(pq.read_table(made.path / "documents.parquet").to_pylist())
        summary = made.about["sets"]["set"]
        for i, (row, document) in enumerate(zip(rows_in(data), found[-1], strict=False)):
            assert document["loss"] == pytest.approx(-shares[i, LABELS.index(row["label"])].item(), rel=1e-4)
            assert document["answer"] == LABELS[shares[i].argmax()]
            assert document["accuracy"] == float(document["answer"] == row["label"])
        assert (summary["documents"], len(found[-1])) == (17, 17)
        assert summary["accuracy"] == pytest.approx(sum(d["accuracy"] for d in found[-1]) / 17)
        assert summary["loss"] == pytest.approx(sum(d["loss"] for d in found[-1]) / 17)
        assert "perplexity" not in summary
        assert work.told[-1]["done"] == work.told[-1]["total"] == 17


def test_a_gate_compares_the_accuracy_of_two_classifiers(tmp_path):
    data, model = small.labelled(tmp_path / "many.jsonl", 60), small.classifier(tmp_path / "model")
    better = tune.body(
        small.Work(tmp_path / "t"), model=model, data=data, held_out=None, method=Full(), training=TRAINING
    )
    results = {
        name: evaluate.body(small.Work(tmp_path / name), model=m, data={"set": data}, length=16)
        for name, m in (("before", model), ("after", better))
    }
    requirement = Requirement(better="after", than="before", on="set", measure="accuracy")
    assert holds(requirement, compared(requirement, results))
    turned = replace(requirement, better="before", than="after")
    assert not holds(turned, compared(turned, results))


def test_a_text_that_is_too_long_loses_its_end_and_is_counted(tmp_path):
    tokenizer = small.tokenizer()
    rows = rows_of(["the cat " * 10, "the", ""], [2, 0, 1], tokenizer, 8)
    assert rows.cut == 1
    whole = tokenizer("the cat " * 10)["input_ids"]
    assert rows.ids[0].tolist() == whole[:8]
    assert rows.targets[0].tolist() == [IGNORED] * 7 + [2]
    assert rows.loss_tokens == 3
    assert rows.targets[2].tolist() == [1] + [IGNORED] * 7


def test_a_worker_without_rows_tells_of_no_label(tmp_path):
    model = load(small.classifier(tmp_path / "model").path)
    rows = rows_of(["the cat"], [1], small.tokenizer(), 8)
    logits, labels = told_of(model, on_device(rows, rows.targets[:0, 0].nonzero()[0], torch.device("cpu")))
    assert logits.shape == (0, 3)
    assert labels.shape == (0,)


def test_what_padding_would_change_is_refused(tmp_path):
    folder = tmp_path / "model"
    config = small.config("llama", num_labels=3, pad_token_id=5)  # of which the tokenizer knows nothing
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    small.tokenizer().save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="padding changes what it tells"):
        check(load(folder), load_tokenizer(folder))


def test_heads_that_tell_no_single_label_are_refused(tmp_path, data):
    for problem, changes in (
        ("multi_label", {"problem_type": "multi_label_classification"}),
        ("number", {"num_labels": 1}),
    ):
        config = small.config("bert", **changes)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / problem)
        small.tokenizer().save_pretrained(tmp_path / problem)
        with pytest.raises(UnsupportedModel, match=f"its head tells .*{problem}.*, expected one of several labels"):
            load(tmp_path / problem)


def test_classifiers_of_the_same_labels_are_merged_and_others_refused_by_name(tmp_path):
    base, one, two = (small.classifier(tmp_path / f"m{seed}", seed=seed) for seed in range(3))
    merged = merge.body(small.Work(tmp_path / "w"), base=base, experts=[one, two], method=TaskArithmetic(scale=0.3))
    start, a, b = (load_file(m.path / "model.safetensors") for m in (base, one, two))
    for name, value in load_file(merged.path / "model.safetensors").items():
        torch.testing.assert_close(value, start[name] + 0.3 * (a[name] - start[name]) + 0.3 * (b[name] - start[name]))
    assert labels_of(merged.path) == LABELS
    other = small.classifier(tmp_path / "other", ("animal", "place", "other"), seed=3)
    with pytest.raises(MergeError, match=r"label 1 is 'place' in its config, expected 'other' as in the base's"):
        merge.body(small.Work(tmp_path / "x"), base=base, experts=[one, other], method=Linear())


def refused(verb, **given):
    return list(verb.problems(**{"resources": Resources(), "held_out": None, "training": TRAINING, **given}))


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path, data):
    encoder, model = small.encoder(tmp_path / "encoder"), small.classifier(tmp_path / "classifier")
    decoder, text = small.saved(tmp_path / "decoder"), small.texts(tmp_path / "text.jsonl")
    assert refused(tune, model=encoder, data=data, held_out=data, method=Full()) == []
    assert refused(tune, model=model, data=data, method=LoRA()) == []
    (clause,) = refused(tune, model=decoder, data=data, method=Full())
    assert "holds 'labelled' rows" in clause
    assert clause.endswith("for a causal language model. Give others.")
    for whole in (encoder, model):
        (clause,) = refused(tune, model=whole, data=text, method=Full())
        assert "holds 'text' rows, expected the columns 'text' and 'label' for a" in clause
    (clause,) = refused(tune, model=encoder, data=data, method=LoRA())
    assert clause.startswith("model: ")
    assert "has no labels yet, expected a classifier. Tune it first" in clause
    (clause,) = refused(tune, model=decoder, data=text, method=LinearProbe())
    assert clause.startswith("LinearProbe: 'decoder' under model, expected 'classifier'.")
    measured = {"base": None, "data": {"set": data}, "kinds": {"model": (Model,)}, "length": 16}
    assert refused(evaluate, model=model, **measured) == []
    (clause,) = refused(evaluate, model=encoder, **measured)
    assert "has no labels yet" in clause
    (clause,) = refused(evaluate, model=model, **measured, generate=4)
    assert clause.startswith("generate=4, expected 0 for a classifier")


def test_a_step_that_gets_other_rows_than_its_model_takes_says_so(tmp_path, data):
    model, decoder = small.classifier(tmp_path / "classifier"), small.saved(tmp_path / "decoder")
    text = small.texts(tmp_path / "text.jsonl")
    for number, (whole, rows, wanted) in enumerate(((model, text, "'text' and 'label'"), (decoder, data, "'text' or"))):
        with pytest.raises(DatasetError, match=f"rows, expected the columns {wanted}"):
            tune.body(
                small.Work(tmp_path / f"t{number}"),
                model=whole,
                data=rows,
                held_out=None,
                method=Full(),
                training=TRAINING,
            )
        with pytest.raises(DatasetError, match=f"rows, expected the columns {wanted}"):
            evaluate.body(small.Work(tmp_path / f"e{number}"), model=whole, data={"set": rows}, length=16)
    with pytest.raises(UnsupportedModel, match="it has no labels yet"):
        tune.body(
            small.Work(tmp_path / "t"),
            model=small.encoder(tmp_path / "encoder"),
            data=data,
            held_out=None,
            method=LoRA(),
            training=TRAINING,
        )


def test_a_label_may_be_a_number_and_nothing_else(tmp_path):
    from operators.data.rows import read_rows

    path = tmp_path / "numbers.jsonl"
    path.write_text('{"text": "a", "label": 3}\n{"text": "b", "label": "x"}\n')
    assert read_rows(Dataset(str(path)))["label"].to_pylist() == ["3", "x"]
    for bad in ("true", "1.5", "null", '["a"]'):
        path.write_text(f'{{"text": "a", "label": {bad}}}\n')
        with pytest.raises(DatasetError, match=r"'label' is .*, expected a string"):
            read_rows(Dataset(str(path)))


def test_a_language_models_verbs_refuse_a_classifier(tmp_path):
    from operators.models.language_models import load as load_decoder

    with pytest.raises(UnsupportedModel, match="it is a classifier, expected a causal language model"):
        load_decoder(small.classifier(tmp_path / "model").path)


def test_the_loss_of_a_new_head_starts_near_that_of_guessing(tmp_path, data):
    work = small.Work(tmp_path / "work")
    tune.body(
        work,
        model=small.encoder(tmp_path / "encoder", **CALM),
        data=data,
        held_out=None,
        method=LinearProbe(),
        training=replace(TRAINING, max_steps=1),
    )
    assert work.curve()[0] == pytest.approx(math.log(3), abs=0.1)
