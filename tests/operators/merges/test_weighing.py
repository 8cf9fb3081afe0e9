"""Merges whose coefficients are learnt on text without labels."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lfm.merging.ada_merging import AdaMerging
from lfm.merging.linear import Linear
from lfm.merging.task_arithmetic import TaskArithmetic
from lfm.tuning.lora import LoRA
from operators.artifact import Dataset, Model
from operators.base import Resources
from operators.data.batches import on_device
from operators.learning.loop import Place
from operators.merges.experts import MergeError
from operators.merges.weighing import _job, layer_of
from operators.merging import merge
from operators.sharing.notices import Preempted
from operators.training import Training
from operators.tuning import tune
from tests.operators import small

pytestmark = pytest.mark.slow

FEW = AdaMerging(steps=12, learning_rate=0.05, batch_size=4)


@pytest.fixture
def classifiers(tmp_path):
    """A base, two experts and a set of text for each."""
    base, *experts = (small.classifier(tmp_path / f"m{seed}", seed=seed) for seed in range(3))
    sets = {"a": small.labelled(tmp_path / "a.jsonl", 9), "b": small.labelled(tmp_path / "b.jsonl", 15)}
    return {"base": base, "experts": experts, "data": sets, "length": 16}


@pytest.fixture
def decoders(tmp_path):
    """The same of language models, whose head is the input embedding."""
    base, *experts = (small.saved(tmp_path / f"d{seed}", seed=seed, tie_word_embeddings=True) for seed in range(3))
    return {"base": base, "experts": experts, "data": {"a": small.texts(tmp_path / "t.jsonl", 9)}, "length": 16}


def weights_of(model):
    return load_file(model.path / "model.safetensors")


def merged(folder, given, method, **changes):
    work = small.Work(folder, changes.pop("resources", None))
    return merge.body(work, method=method, **{**given, **changes}), work


def texts_in(dataset):
    return [json.loads(line)["text"] for line in dataset.path.read_text().splitlines()]


def entropy(logits):
    shares = logits.softmax(-1)
    return -(shares * shares.log()).sum(-1)


@pytest.mark.parametrize("kind", ["classifiers", "decoders"])
def test_without_a_step_it_is_task_arithmetic(kind, request, tmp_path):
    given = request.getfixturevalue(kind)
    found, _ = merged(tmp_path / "ada", given, AdaMerging(steps=0))
    plain, _ = merged(tmp_path / "plain", {**given, "data": {}}, TaskArithmetic(scale=0.3))
    one, other = weights_of(found), weights_of(plain)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert found.about["coefficients"] == [0.3, 0.3]


def shown(given, objective, text):
    """The entropies of one text alone, told by transformers' own model with the weights of the merge's start."""
    base, experts = given["base"], given["experts"]
    kind = transformers.AutoModelForSequenceClassification
    if "decoders" in objective:
        kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(base.path).eval()
    start, theirs = weights_of(base), [weights_of(e) for e in experts]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name] + sum(0.3 * (t[name] - start[name]) for t in theirs))
    ids = transformers.AutoTokenizer.from_pretrained(base.path)(text)["input_ids"]
    if "decoders" in objective:
        ids = [*ids, 0]  # what ends a text is told too
    logits = model(torch.tensor([ids[:16]])).logits
    return model, entropy(logits[0, :-1] if "decoders" in objective else logits)


@pytest.mark.parametrize("kind", ["classifiers", "decoders"])
def test_a_coefficient_gets_the_gradient_of_its_layer_times_its_delta_and_nothing_else_learns(kind, request):
    given = request.getfixturevalue(kind)
    training = Training(max_steps=1, batch_size=8, length=16, packing=False)
    arguments = {k: given[k] for k in ("base", "experts", "data")}
    job = _job(Place(), **arguments, method=AdaMerging(), training=training)
    assert [n for n, p in job.objective.named_parameters() if p.requires_grad] == ["learnt"]
    number = len(texts_in(given["data"]["a"]))
    loss = job.objective(on_device(job.rows, torch.arange(number).numpy(), torch.device("cpu")))
    loss.backward()
    start, theirs = weights_of(given["base"]), [weights_of(e) for e in given["experts"]]
    total, expected = 0.0, {}
    for text in texts_in(given["data"]["a"]):
        model, each = shown(given, kind, text)
        each.sum().backward()
        total += each.sum().item()
        for name, p in model.named_parameters():
            for k, expert in enumerate(theirs):
                key = (layer_of(name), k)
                expected[key] = expected.get(key, 0.0) + (p.grad * (expert[name] - start[name])).sum().item()
    assert loss.item() == pytest.approx(total, rel=1e-4)
    groups = list(dict.fromkeys(layer_of(n) for n in start))
    assert {group for group, _ in expected} == set(groups)
    for (group, k), value in expected.items():
        assert job.objective.learnt.grad[groups.index(group), k].item() == pytest.approx(value, rel=2e-3, abs=2e-4)
    assert all(p.grad is None for p in job.objective.objective[0].parameters())


@pytest.mark.parametrize("kind", ["classifiers", "decoders"])
def test_entropy_falls_and_the_model_is_what_the_coefficients_beside_it_say(kind, request, tmp_path):
    given = request.getfixturevalue(kind)
    found, work = merged(tmp_path / "ada", given, FEW)
    curve = work.curve()
    assert len(curve) == 12
    assert sum(curve[-3:]) < sum(curve[:3])
    said = json.loads((found.path / "coefficients.json").read_text())
    start, theirs = weights_of(given["base"]), [weights_of(e) for e in given["experts"]]
    assert set(said) == {layer_of(n) for n in start}
    for name, value in weights_of(found).items():
        scales = said[layer_of(name)]
        expected = start[name] + sum(c * (t[name] - start[name]) for c, t in zip(scales, theirs, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    means = torch.tensor(list(said.values())).mean(0)
    assert found.about["coefficients"] == pytest.approx(means.tolist(), abs=1e-5)
    assert found.about["coefficients"] != pytest.approx([0.3, 0.3], abs=0.01)


def test_one_coefficient_for_each_task_is_one_for_all_parameters(classifiers, tmp_path):
    found, _ = merged(tmp_path / "ada", classifiers, AdaMerging(granularity="task", steps=3, learning_rate=0.05))
    said = json.loads((found.path / "coefficients.json").read_text())
    assert list(said) == ["all"]
    assert found.about["coefficients"] == said["all"]


def test_labels_are_not_read(classifiers, tmp_path):
    bare = {}
    for name, dataset in classifiers["data"].items():
        path = tmp_path / f"bare-{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_in(dataset)))
        bare[name] = Dataset(str(path))
    one, _ = merged(tmp_path / "one", classifiers, FEW)
    other, _ = merged(tmp_path / "other", classifiers, FEW, data=bare)
    assert one.about == other.about


def test_adapters_are_weighed_as_what_they_do_to_the_base(classifiers, tmp_path):
    import peft

    base, adapters, wholes = classifiers["base"], [], []
    for name, dataset in classifiers["data"].items():
        training = Training(max_steps=8, batch_size=8, length=16, learning_rate=0.05)
        work = small.Work(tmp_path / f"tune-{name}")
        adapters.append(
            tune.body(work, model=base, data=dataset, held_out=None, method=LoRA(rank=2), training=training)
        )
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base.path)
        whole = peft.PeftModel.from_pretrained(model, adapters[-1].path).merge_and_unload()
        whole.save_pretrained(tmp_path / f"whole-{name}")
        wholes.append(Model(str(tmp_path / f"whole-{name}")))
    one, _ = merged(tmp_path / "one", classifiers, FEW, experts=adapters)
    other, _ = merged(tmp_path / "other", classifiers, FEW, experts=wholes)
    assert one.about["coefficients"] == pytest.approx(other.about["coefficients"], abs=1e-4)


def test_a_layer_is_a_block_or_what_stands_outside_of_blocks():
    named = {
        "model.layers.11.mlp.up_proj.weight": "model.layers.11",
        "model.layers.2.mlp.experts.3.w1.weight": "model.layers.2",
        "h.0.ln_1.bias": "h.0",
        "bert.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings",
        "classifier.bias": "classifier",
        "scale": "scale",
    }
    assert {name: layer_of(name) for name in named} == named


@pytest.mark.parametrize("after", [5, 14], ids=["while it learns", "while it merges"])
def test_what_was_broken_off_goes_on_to_the_same_bytes(classifiers, tmp_path, after):
    whole, undisturbed = merged(tmp_path / "whole", classifiers, FEW)
    work = small.Work(tmp_path / "first")
    work.goes_at = after
    with pytest.raises(Preempted):
        merge.body(work, method=FEW, **classifiers)
    again = small.Work(tmp_path / "again")
    again.checkpoints += work.checkpoints
    found = merge.body(again, method=FEW, **classifiers)
    assert again.curve() == undisturbed.curve()[after + 1 :]  # a step that has begun ends
    for name in ("model.safetensors", "coefficients.json"):
        assert (found.path / name).read_bytes() == (whole.path / name).read_bytes()


def refused(given, method, **changes):
    return list(merge.problems(**{**given, "method": method, "resources": Resources(), **changes}))


def test_what_cannot_be_weighed_is_refused_before_anything_runs(classifiers, decoders, tmp_path):
    assert refused(classifiers, FEW) == []
    assert refused(decoders, FEW) == []
    assert refused({**decoders, "base": None, "experts": [None], "data": {"a": None}}, FEW) == []
    (clause,) = refused(classifiers, FEW, data=None)
    assert clause == "AdaMerging: no data, expected unlabelled rows to learn from. Name them under data."
    (clause,) = refused(classifiers, Linear())
    assert clause == "Linear: data is given, expected none, as it uses none. Leave it out."
    (clause,) = refused(decoders, FEW, data={"pairs": small.pairs(tmp_path / "pairs.jsonl")})
    assert re.match(r"data 'pairs': .* holds 'prompt_completion' rows, expected the columns 'text' for", clause)
    (clause,) = refused(classifiers, FEW, length=65)
    assert clause.startswith("length=65, expected at most the 64 tokens")
    (clause,) = refused(classifiers, FEW, length=1)
    assert clause.startswith("length=1, expected length >= 2")
    encoders = [small.encoder(tmp_path / f"e{i}") for i in range(2)]
    (clause,) = refused(classifiers, FEW, base=encoders[0], experts=encoders[1:])
    assert "is an encoder: it has no labels yet" in clause
    with pytest.raises(MergeError, match="no data, expected unlabelled rows"):
        merged(tmp_path / "w", classifiers, FEW, data={})


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_learn_the_coefficients_of_one(classifiers, tmp_path, one_ray):
    alone, work = merged(tmp_path / "alone", classifiers, FEW)
    both, told = merged(tmp_path / "both", classifiers, FEW, resources=Resources(workers=2))
    assert told.curve() == pytest.approx(work.curve(), rel=1e-4)
    assert both.about["coefficients"] == pytest.approx(alone.about["coefficients"], abs=1e-4)
