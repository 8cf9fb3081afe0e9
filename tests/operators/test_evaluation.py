import json
import math

import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from lfm.errors import HyperparameterError
from operators.artifact import Adapter, Dataset, Model
from operators.data.batches import NoLossToken
from operators.data.row_files import DatasetError
from operators.data.rows import digest_of
from operators.engines.native import Native
from operators.evaluation import evaluate
from operators.models.changed_models import BaseNeeded
from operators.models.language_models import load, load_tokenizer
from tests.operators import small

TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "and the dog"},
    {"role": "assistant", "content": "ran"},
]


def lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Dataset(str(path))


@pytest.fixture
def model(tmp_path):
    return small.saved(tmp_path / "model")


@pytest.fixture
def measured(workspace, tmp_path):
    """`evaluate`, each time in a folder of its own: what it found, and the documents by set."""
    count = 0

    def call(**arguments):
        nonlocal count
        count += 1
        workspace.scratch = tmp_path / f"scratch{count}"
        workspace.scratch.mkdir()
        result = evaluate.body(workspace, **{"length": 32, **arguments})
        assert json.loads((result.path / "metrics.json").read_text()) == result.about
        sets = {}
        for row in pq.read_table(result.path / "documents.parquet").to_pylist():
            sets.setdefault(row.pop("set"), []).append(row)
        return result.about, sets

    return call


def cost(model, ids, answer, length):
    """The summed loss of a document's answer tokens and their number, one token after another."""
    total, tokens = 0.0, 0
    for start in range(0, len(ids), length):
        piece, learnt = ids[start : start + length], answer[start : start + length]
        with torch.no_grad():
            shares = model(input_ids=torch.tensor([piece])).logits[0].double().log_softmax(-1)
        for i in range(1, len(piece)):
            if learnt[i]:
                total -= shares[i - 1, piece[i]].item()
                tokens += 1
    return total, tokens


def conversation_of(messages, tokenizer):
    """The tokens of a conversation, and which the assistant says, turn by turn."""
    ids, answer = [], []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        asked, all_of_it = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
        answer += [False] * (len(asked) - len(ids)) + [True] * (len(all_of_it) - len(asked))
        ids = all_of_it
    return ids, answer


def test_losses_are_those_of_each_document_alone(model, measured, tmp_path):
    data = {
        "pairs": small.pairs(tmp_path / "pairs.jsonl", 9),
        "texts": lines(tmp_path / "texts.jsonl", [{"text": " ".join(small.WORDS * n)} for n in (2, 4, 3)]),
        "talks": lines(tmp_path / "talks.jsonl", [{"messages": TALK[:2]}, {"messages": TALK}]),
    }
    about, found = measured(model=model, data=data, length=16, batch_size=4)
    plain, tokenizer = load(model.path), load_tokenizer(model.path)
    for name, dataset in data.items():
        expected = []
        for row in map(json.loads, dataset.path.read_text().splitlines()):
            if name == "texts":
                ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
                assert len(ids) > 16  # so that every text is in pieces
                answer = [True] * len(ids)
            elif name == "pairs":
                said = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
                ids, answer = conversation_of(said, tokenizer)
            else:
                ids, answer = conversation_of(row["messages"], tokenizer)
            expected.append(cost(plain, ids, answer, 16))
        assert [row["tokens"] for row in found[name]] == [tokens for _, tokens in expected]
        assert [row["loss"] for row in found[name]] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
        summary, tokens = about["sets"][name], sum(tokens for _, tokens in expected)
        mean = sum(loss for loss, _ in expected) / tokens
        assert summary["loss"] == pytest.approx(mean, rel=1e-5)
        assert summary["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert (summary["documents"], summary["tokens"]) == (len(expected), tokens)
    assert about["parameters"] == sum(p.numel() for p in plain.parameters())


def test_how_many_rows_go_at_once_changes_nothing_but_noise(model, measured, tmp_path, monkeypatch):
    data = {"pairs": small.pairs(tmp_path / "pairs.jsonl"), "texts": small.texts(tmp_path / "texts.jsonl")}
    runs = [measured(model=model, data=data, batch_size=n, generate=6)[1] for n in (1, 5, 100)]
    monkeypatch.setattr("operators.measures.answers.chunk_size", lambda *_: 3)  # logits of three tokens at once
    runs.append(measured(model=model, data=data, batch_size=5, generate=6)[1])
    for run in runs[1:]:
        for name, documents in run.items():
            assert [d["loss"] for d in documents] == pytest.approx([d["loss"] for d in runs[0][name]], rel=1e-5)
            assert [d["tokens"] for d in documents] == [d["tokens"] for d in runs[0][name]]
            assert [d["answer"] for d in documents] == [d["answer"] for d in runs[0][name]]


def test_answers_are_what_the_model_generates_for_each_prompt(model, measured, tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[:2]}]
    _, found = measured(model=model, data={"talks": lines(tmp_path / "a.jsonl", rows)}, generate=6)
    plain, tokenizer = load(model.path), load_tokenizer(model.path)
    for document, row in zip(found["talks"], rows, strict=True):
        text = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        said = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        assert document["answer"] == tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_an_adapter_is_measured_on_its_base_and_on_no_other(model, measured, tmp_path):
    base = Model(model.uri, "base" * 16)
    changed = peft.get_peft_model(load(model.path), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    changed.save_pretrained(tmp_path / "adapter")
    adapter = Adapter(str(tmp_path / "adapter"), about={"base": base.digest})
    whole = transformers.AutoModelForCausalLM.from_pretrained(model.path)
    whole = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter").merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    small.tokenizer().save_pretrained(tmp_path / "whole")
    data = {"pairs": small.pairs(tmp_path / "pairs.jsonl")}
    _, on_base = measured(model=adapter, base=base, data=data, generate=4)
    _, merged = measured(model=Model(str(tmp_path / "whole")), data=data, generate=4)
    _, without = measured(model=base, data=data)
    losses = [[row["loss"] for row in found["pairs"]] for found in (on_base, merged, without)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)
    assert [row["answer"] for row in on_base["pairs"]] == [row["answer"] for row in merged["pairs"]]
    with pytest.raises(BaseNeeded, match=r"evaluate: base is none, expected the adapter's, basebasebase\. Give"):
        measured(model=adapter, data=data)
    with pytest.raises(BaseNeeded, match="base is otherother"):
        measured(model=adapter, base=Model(model.uri, "other" * 12), data=data)


def test_sets_of_text_are_asked_nothing_and_progress_counts_documents(model, measured, workspace, tmp_path):
    data = {"texts": small.texts(tmp_path / "texts.jsonl", 5), "pairs": small.pairs(tmp_path / "pairs.jsonl", 7)}
    about, found = measured(model=model, data=data, generate=3, batch_size=4)
    assert "chrf" not in about["sets"]["texts"]
    assert {row["answer"] for row in found["texts"]} == {None}
    summary = about["sets"]["pairs"]
    assert summary["chrf"] == pytest.approx(sum(row["chrf"] for row in found["pairs"]) / 7)
    assert summary["exact_match"] == pytest.approx(sum(row["exact_match"] for row in found["pairs"]) / 7)
    assert [(line["done"], line["total"]) for line in workspace.told] == [(5, 19), (12, 19), (16, 19), (19, 19)]


def test_a_document_without_an_answer_weighs_nothing(model, measured, tmp_path):
    rows = [{"messages": TALK[:2]}, {"messages": TALK[:1]}, {"messages": TALK[:3]}]
    data = {"talks": lines(tmp_path / "a.jsonl", rows)}
    _, found = measured(model=model, data=data)
    assert [row["tokens"] > 0 for row in found["talks"]] == [True, False, True]
    assert found["talks"][1]["loss"] == 0
    _, without = measured(model=model, data={"talks": lines(tmp_path / "b.jsonl", rows[::2])})
    assert [row["loss"] for row in without["talks"]] == pytest.approx([row["loss"] for row in found["talks"][::2]])
    with pytest.raises(DatasetError, match="set 'talks' document 2: has no turn of the assistant, expected one"):
        measured(model=model, data=data, generate=3)
    with pytest.raises(NoLossToken, match="talks: none of"):
        measured(model=model, data={"talks": lines(tmp_path / "c.jsonl", rows[1:2])})


def test_an_empty_text_has_no_loss_and_an_empty_answer_the_cost_of_ending(model, measured, tmp_path):
    texts = lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": "the cat"}])
    pairs = lines(tmp_path / "b.jsonl", [{"prompt": "", "completion": ""}, {"prompt": "the", "completion": "cat"}])
    _, found = measured(model=model, data={"texts": texts, "pairs": pairs}, generate=3)
    assert found["texts"][0]["tokens"] == 0
    assert found["pairs"][0]["tokens"] == 1
    assert found["pairs"][0]["exact_match"] == float(found["pairs"][0]["answer"] == "")


def test_a_tokenizer_without_template_joins_prompt_and_answer(tmp_path, measured):
    model = small.saved(tmp_path / "model")
    (model.path / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(model.path)
    pairs = [{"prompt": "", "completion": "the cat"}, {"prompt": "the cat", "completion": "sat"}]
    _, found = measured(model=model, data={"pairs": lines(tmp_path / "a.jsonl", pairs)}, generate=3)
    plain = load(model.path)
    for row, document in zip(pairs, found["pairs"], strict=True):
        asked, said = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids, answer = [*asked, *said, 0], [False] * len(asked) + [True] * (len(said) + 1)
        total, tokens = cost(plain, ids, answer, 32)
        assert (document["tokens"], document["loss"]) == (tokens, pytest.approx(total, rel=1e-5))
        prompt = torch.tensor([asked or [tokenizer.eos_token_id]])
        said = plain.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3)
        assert document["answer"] == tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def test_a_result_says_by_a_digest_which_documents_it_is_about(model, measured, tmp_path):
    rows = [json.loads(line) for line in small.pairs(tmp_path / "a.jsonl").path.read_text().splitlines()]
    sets = {
        "a": Dataset(str(tmp_path / "a.jsonl")),
        "same": lines(tmp_path / "b.jsonl", [{**row, "source": "elsewhere"} for row in rows]),
        "shorter": lines(tmp_path / "c.jsonl", rows[:-1]),
        "turned": lines(tmp_path / "d.jsonl", rows[::-1]),
    }
    about, _ = measured(model=model, data=sets)
    digests = {name: summary["digest"] for name, summary in about["sets"].items()}
    assert digests["a"] == digests["same"]
    assert len(set(digests.values())) == 3
    about, found = measured(model=model, data=sets, max_documents=len(rows) - 1)
    assert about["sets"]["a"]["digest"] == digests["shorter"]
    assert len(found["a"]) == len(rows) - 1
    assert digest_of({"text": ["ab", "c"]}) != digest_of({"text": ["a", "bc"]})


def test_what_is_out_of_range_is_refused(model, measured, tmp_path):
    data = {"pairs": small.pairs(tmp_path / "a.jsonl")}
    for params in ({"length": 1}, {"batch_size": 0}, {"max_documents": 0}, {"generate": -1}):
        with pytest.raises(HyperparameterError, match=f"evaluate: {next(iter(params))}="):
            measured(model=model, data=data, **params)
    with pytest.raises(HyperparameterError, match="length=65, expected length <= 64, the model's context"):
        measured(model=model, data=data, length=65)
    long = {"long": lines(tmp_path / "b.jsonl", [{"prompt": "the cat " * 40, "completion": "sat"}])}
    with pytest.raises(DatasetError, match=r"set 'long' document 1: asks with \d+ tokens, expected fewer .* of 64"):
        measured(model=model, data={**data, **long}, generate=1)


MODEL = {"model": (Model,), "data": (Dataset,)}


def test_a_plan_hears_that_an_adapter_has_no_base_before_there_is_an_adapter():
    asked = {"model": None, "base": None, "data": {"later": None}, "resources": None}
    (said,) = evaluate.problems(**asked, kinds={"model": (Adapter,), "data": (Dataset,)})
    assert said.startswith("base: none is given and model is an adapter")
    assert list(evaluate.problems(**asked, kinds={"model": (Adapter,), "base": (Model,), "data": (Dataset,)})) == []


def test_a_plan_hears_of_everything_at_once(model, tmp_path):
    data = {"pairs": small.pairs(tmp_path / "a.jsonl"), "later": None}
    assert list(evaluate.problems(model=model, base=None, data=data, length=64, resources=None, kinds=MODEL)) == []
    assert list(evaluate.problems(model=None, base=None, data={"later": None}, resources=None, kinds=MODEL)) == []
    data["wrong"] = lines(tmp_path / "b.jsonl", [{"question": "a"}])
    found = list(evaluate.problems(model=model, base=None, data=data, length=65, resources=None, kinds=MODEL))
    assert [sentence.split(",")[0] for sentence in found] == [
        "length=65",
        f"data 'wrong': {tmp_path}/b.jsonl: has the columns 'question'",
    ]
    found = list(
        evaluate.problems(model=None, base=None, data={}, batch_size=0, generate=-1, resources=None, kinds=MODEL)
    )
    assert [sentence.split(",")[0] for sentence in found] == [
        "evaluate: batch_size=0",
        "evaluate: generate=-1",
        "evaluate: data is empty",
    ]


def test_an_engine_knows_the_context_of_its_model(model):
    assert Native(load(model.path), load_tokenizer(model.path)).context == 64
