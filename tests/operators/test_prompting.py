import json
import math
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file

from lfm.errors import HyperparameterError, ShapeError
from lfm.oracle import Oracle
from lfm.prompting.bbt import BBT
from operators.artifact import Dataset, Model
from operators.catalog import Catalog
from operators.data.row_files import DatasetError
from operators.engines.native import Native, Sampling
from operators.evaluation import evaluate
from operators.models.choices import read_choices
from operators.models.language_models import adapted, load, load_tokenizer
from operators.models.soft_prompts import PackedPrompt, is_soft_prompt, length_of
from operators.prompting import problems, prompt
from operators.sharing.notices import Preempted
from tests.operators import small

pytestmark = pytest.mark.slow

METHOD = BBT(length=3, dimension=4, population=4, budget=24)
IDS = torch.tensor([[7, 11, 23, 5, 19], [31, 3, 40, 41, 2]])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("prompting")


@pytest.fixture(scope="module")
def model(home):
    return small.saved(home / "model")


def written(path, rows):
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return Dataset(str(path))


@pytest.fixture(scope="module")
def rows(home):
    """Whether a cat or a dog was there."""
    said = [(f"{w} {a} {w}", "sat" if a == "cat" else "ran") for a in ("cat", "dog") for w in small.WORDS[3:8]]
    return written(home / "rows.jsonl", said)


@pytest.fixture(scope="module")
def others(home):
    return written(home / "others.jsonl", [("rain the cat", "sat"), ("over the dog", "ran"), ("to dog", "ran")])


def work_in(home):
    work_in.count += 1
    return small.Work(home / f"work-{work_in.count}")


work_in.count = 0


@pytest.fixture(scope="module")
def found(home, model, rows, others):
    """A prompt, and what was told on the way."""
    work = work_in(home)
    return prompt.body(work, model=model, data=rows, held_out=others, method=METHOD, batch_size=4), work


def by_hand(model, folder, text, tokenizer):
    """What the model says next, of embeddings that are put together here."""
    ids = tokenizer(f"<|user|>{text}{tokenizer.eos_token}<|assistant|>")["input_ids"]
    virtual = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    whole = torch.cat([virtual, model.get_input_embeddings()(torch.tensor(ids))])[None]
    with torch.no_grad():
        return model(inputs_embeds=whole).logits[0, -1].softmax(-1)


def test_the_loss_and_the_accuracy_are_those_of_the_best_prompt(found, model, rows, others):
    adapter, work = found
    whole, tokenizer = load(model.path), load_tokenizer(model.path)
    begins = {word: tokenizer(word)["input_ids"][0] for word in ("ran", "sat")}
    for data, name in ((rows, "accuracy"), (others, "held_out_accuracy")):
        right, loss = 0, 0.0
        lines = [json.loads(line) for line in data.path.read_text().splitlines()]
        for line in lines:
            said = by_hand(whole, adapter.path, line["prompt"], tokenizer)
            shares = {word: said[token].item() for word, token in begins.items()}
            right += max(shares, key=shares.get) == line["completion"]
            loss -= math.log(shares[line["completion"]] / sum(shares.values()))
        assert adapter.about[name] == pytest.approx(right / len(lines))
        if name == "accuracy":
            assert adapter.about["loss"] == pytest.approx(loss / len(lines), rel=1e-4)
    assert adapter.about["labels"] == ["ran", "sat"]
    assert adapter.about["base"] == "d" * 64
    assert min(work.curve()) == work.curve("best")[-1] == adapter.about["loss"] < work.curve("best")[0]


def test_no_gradient_is_taken_and_all_of_the_budget_is_spent(monkeypatch, workspace, model, rows):
    def refuse(*_, **__):
        raise AssertionError("autograd was asked")

    for name in ("backward", "grad"):
        monkeypatch.setattr(torch.autograd, name, refuse)
    asked = []
    ask = Oracle.__call__

    def counted(oracle, x):
        answer = ask(oracle, x)
        asked.append((len(x), oracle.spent, answer.requires_grad))
        return answer

    monkeypatch.setattr(Oracle, "__call__", counted)
    made = prompt.body(workspace, model=model, data=rows, method=METHOD)
    assert [n for n, _, _ in asked] == [4] * 6
    assert asked[-1][1] == METHOD.budget == made.about["calls"]
    assert not any(needs for _, _, needs in asked)


def test_what_was_answered_is_not_asked_again(monkeypatch, home, model, rows, found):
    work = work_in(home)
    work.goes_at = 2
    with pytest.raises(Preempted):
        prompt.body(work, model=model, data=rows, method=METHOD, batch_size=4)
    again = work.another()
    again.checkpoints = work.checkpoints
    made = prompt.body(again, model=model, data=rows, method=METHOD, batch_size=4)
    assert [line["done"] for line in again.told] == [12, 16, 20, 24]
    assert (made.path / "adapter_model.safetensors").read_bytes() == (
        found[0].path / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_peft_reads_the_prompt_and_says_the_same(tmp_path, found, kind):
    small.model(kind).save_pretrained(tmp_path / "base")
    ours = adapted(load(tmp_path / "base"), found[0].path)
    theirs = peft.PeftModel.from_pretrained(load(tmp_path / "base"), found[0].path)
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits[:, 3:]  # of the virtual tokens it tells too
        torch.testing.assert_close(ours(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        plain = load(tmp_path / "base")(input_ids=IDS).logits
        assert (plain - wanted).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_generating_is_reading_step_by_step_and_padding_changes_nothing(tmp_path, found, kind):
    small.model(kind).save_pretrained(tmp_path / "base")
    engine = Native(adapted(load(tmp_path / "base"), found[0].path), small.tokenizer())
    assert engine.context in (None, 61)
    prompts = [[7, 11, 23], [31, 3, 40, 41, 2, 9]]
    together = engine.complete(prompts, Sampling(max_tokens=5))
    for ids, said in zip(prompts, together, strict=True):
        for step, token in enumerate(said):
            with torch.no_grad():
                logits = engine.model(input_ids=torch.tensor([ids + said[:step]])).logits
            assert int(logits[0, -1].argmax()) == token


def test_evaluate_reads_behind_the_prompt(workspace, found, model, rows):
    """The first token's loss by hand, of one word answers; of the end token that follows it, too."""
    about = evaluate.body(workspace, model=found[0], base=model, data={"rows": rows}, length=48, generate=1).about
    whole, tokenizer = load(model.path), load_tokenizer(model.path)
    virtual = load_file(found[0].path / "adapter_model.safetensors")["prompt_embeddings"]
    total, count = 0.0, 0
    for line in map(json.loads, rows.path.read_text().splitlines()):
        end = tokenizer.eos_token
        asked = tokenizer(f"<|user|>{line['prompt']}{end}<|assistant|>")["input_ids"]
        ids = asked + tokenizer(line["completion"] + end)["input_ids"]
        embedded = torch.cat([virtual, whole.get_input_embeddings()(torch.tensor(ids))])[None]
        with torch.no_grad():
            said = whole(inputs_embeds=embedded).logits[0, 3:].log_softmax(-1)
        for at in range(len(asked), len(ids)):
            total -= said[at - 1, ids[at]].item()
            count += 1
    assert about["sets"]["rows"]["loss"] == pytest.approx(total / count, rel=1e-4)
    bare = evaluate.body(workspace.another(), model=model, data={"rows": rows}, length=48).about
    assert about["sets"]["rows"]["loss"] != pytest.approx(bare["sets"]["rows"]["loss"], rel=1e-3)


def test_a_row_of_several_documents_is_refused(found, model):
    whole = adapted(load(model.path), found[0].path)
    assert (length_of(whole), length_of(load(model.path))) == (3, 0)
    with pytest.raises(PackedPrompt, match="a row holds several documents, expected one"):
        whole.get_decoder()(input_ids=IDS, position_ids=torch.arange(5).expand(2, -1))


def test_a_prompt_for_another_width_is_refused(tmp_path, found):
    small.model(hidden_size=32, num_key_value_heads=2).save_pretrained(tmp_path / "wide")
    assert is_soft_prompt(found[0].path)
    with pytest.raises(ShapeError, match="prompt_embeddings"):
        adapted(load(tmp_path / "wide"), found[0].path)


def test_choices_are_the_completions(model, rows, others):
    tokenizer = load_tokenizer(model.path)
    known = read_choices(rows, tokenizer, room=None)
    assert known.words == ("ran", "sat")
    assert known.labels.tolist() == [1] * 5 + [0] * 5
    assert known.tokens == tuple(tokenizer(word)["input_ids"][0] for word in known.words)
    more = read_choices(others, tokenizer, room=None, like=known)
    assert (more.words, more.labels.tolist()) == (known.words, [1, 0, 0])


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([("cat", "sat"), ("dog", "sat")], "has the labels 'sat', expected at least two"),
        ([("cat", "sat"), ("dog", "sat on")], "has the labels 'sat', 'sat on', expected at least two that begin"),
        ([("cat " * 40, "sat"), ("dog", "ran")], r"row 1: asks with \d+ tokens, expected at most 30"),
    ],
)
def test_rows_that_are_no_choices_are_refused(tmp_path, model, said, why):
    data = written(tmp_path / "odd.jsonl", said)
    with pytest.raises(DatasetError, match=why):
        read_choices(data, load_tokenizer(model.path), room=30)


def test_a_new_label_among_held_out_rows_is_refused(tmp_path, workspace, model, rows):
    data = written(tmp_path / "odd.jsonl", [("cat", "fell")])
    with pytest.raises(DatasetError, match="row 1: has the label 'fell', expected one of 'ran', 'sat'"):
        prompt.body(workspace, model=model, data=rows, held_out=data, method=METHOD)


def test_the_plan_says_what_is_wrong(home, tmp_path, workspace, model, rows):
    given = {"model": model, "data": rows, "held_out": None, "method": METHOD}
    assert list(problems(**given)) == []
    assert list(problems(model=None, data=None, held_out=None, method=METHOD)) == []
    text = small.texts(home / "texts.jsonl")
    (clause,) = problems(**{**given, "data": text})
    assert clause.startswith("data: ")
    assert "holds 'text' rows" in clause
    (clause,) = problems(**{**given, "method": replace(METHOD, length=64)})
    assert clause.startswith("length=64, expected fewer than the model's context of 64 tokens")
    (clause,) = problems(**{**given, "model": Model(str(tmp_path))})
    assert "has no config.json" in clause
    for field, value in (("batch_size", 0), ("seed", -1)):
        (clause,) = problems(**given, **{field: value})
        assert f"{field}={value}" in clause
        with pytest.raises(HyperparameterError):
            prompt.body(workspace, model=model, data=rows, method=METHOD, **{field: value})


def test_the_verb_is_found_by_its_name():
    assert set(Catalog().operator("prompt").edges) == {"model", "data", "held_out"}
