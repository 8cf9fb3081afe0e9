"""What is measured of facts, against the definitions, one prompt after another."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from lfm.deltas import Dense, LowRank, add, write
from operators.artifact import Dataset, Delta, Model
from operators.data.facts import FactRow, Neighbour, carry, spoken
from operators.data.row_files import DatasetError
from operators.engines.native import Native
from operators.evaluation import evaluate
from operators.gating import GateClosed, Requirement, gate
from operators.measures.edit_scores import Asked, digest_of, edit_scores, entropy, heard, means
from operators.models.changed_models import AnotherVocabulary, BaseNeeded
from operators.models.language_models import load, load_tokenizer
from tests.operators import small

pytestmark = pytest.mark.slow

ROWS = [
    FactRow(
        subject="cat",
        prompt="the cat sat on",
        target="the mat",
        true="it",
        paraphrases=("on a mat the cat", "rain fell over the cat and"),
        neighbours=(Neighbour("the dog ran to", "a mat and it"), Neighbour("while rain fell")),
    ),
    FactRow(subject="dog", prompt="the dog ran", target="over", paraphrases=("a dog and",)),
    FactRow(
        subject="rain", prompt="while rain", target="fell on a cat", true="ran", neighbours=(Neighbour("a", "cat"),)
    ),
    FactRow(subject="mat", prompt="it ran to a mat", target="and"),
]


def saying(base, row):
    """A change of the head after which the model says a fact of one token: that token's row grows along its state."""
    engine = Native(load(base), load_tokenizer(base))
    prompt, (target,) = spoken(row.prompt, row.target, engine.tokenizer)
    with torch.no_grad():
        state = engine.model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
    left = torch.zeros(small.VOCABULARY, 1)
    left[target] = 20 / state.norm() ** 2
    return {"lm_head.weight": LowRank(left, state[None])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and what became of it, both with large weights so that they say different things."""
    root = tmp_path_factory.mktemp("models")
    return small.saved(root / "model", seed=3).path, small.saved(root / "base", seed=4).path


@pytest.fixture(scope="module")
def engines(folders):
    """The model, changed so that it says one of the facts, and its base."""
    found = [Native(load(f), load_tokenizer(f)) for f in folders]
    add(found[0].model, saying(folders[0], ROWS[1]))
    return found


@torch.no_grad()
def places(engine, prompt, answer):
    """The log-probabilities of all tokens at each place of an answer, one place after another."""
    found = []
    for i in range(len(answer)):
        ids = torch.tensor([[*prompt, *answer[:i]]])
        found.append(engine.model(input_ids=ids).logits[0, -1].double().log_softmax(-1))
    return found


def probability(engine, prompt, answer):
    logs = [p[t].item() for p, t in zip(places(engine, prompt, answer), answer, strict=True)]
    return math.exp(sum(logs) / len(logs))


def right(engine, prompt, answer):
    return sum(int(p.argmax()) == t for p, t in zip(places(engine, prompt, answer), answer, strict=True)) / len(answer)


def says(engine, prompt, answer):
    said = list(prompt)
    for _ in answer:
        said.append(int(places(engine, said, [0])[0].argmax()))
    return float(said[len(prompt) :] == list(answer))


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def expected_of(row, engine, base):
    def tokens(prompt, answer):
        return spoken(prompt, answer, engine.tokenizer)

    found = {}
    for name, prompts in (("efficacy", [row.prompt]), ("paraphrase", row.paraphrases)):
        found[name] = mean(right(engine, *tokens(p, row.target)) for p in prompts)
        found[f"{name}_exact"] = mean(says(engine, *tokens(p, row.target)) for p in prompts)
        pairs = [
            (probability(engine, *tokens(p, row.target)), probability(engine, *tokens(p, row.true)))
            for p in prompts
            if row.true
        ]
        found[f"{name}_success"] = mean(float(new > old) for new, old in pairs)
        found[f"{name}_magnitude"] = mean(new - old for new, old in pairs)
    pairs = [
        (probability(engine, *tokens(n.prompt, n.answer)), probability(engine, *tokens(n.prompt, row.target)))
        for n in row.neighbours
        if n.answer
    ]
    found["neighbour_success"] = mean(float(own > new) for own, new in pairs)
    found["neighbour_magnitude"] = mean(own - new for own, new in pairs)
    agree, divergence = [], []
    for n in row.neighbours:
        prompt, answer = tokens(n.prompt, n.answer) if n.answer else (tokens(n.prompt, "it")[0], [0])
        both = list(zip(places(base, prompt, answer), places(engine, prompt, answer), strict=True))
        agree.append(mean(float(b.argmax() == m.argmax()) for b, m in both))
        divergence.append(mean((b.exp() * (b - m)).sum().item() for b, m in both))
    found["specificity"], found["divergence"] = mean(agree), mean(divergence)
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_every_measure_is_its_definition_fact_by_fact(engines, batch_size, monkeypatch):
    engine, base = engines
    monkeypatch.setattr("operators.measures.edit_scores.chunk_size", lambda *_: 2)  # logits of two places at once
    told = []
    found = edit_scores(engine, ROWS, base=base, batch_size=batch_size, name="set", told=told.append)
    for i, row in enumerate(ROWS):
        for measure, value in expected_of(row, engine, base).items():
            assert found[measure][i] == (None if value is None else pytest.approx(value, abs=1e-6)), (measure, i)
    assert found["prompt"] == [r.prompt for r in ROWS]
    assert found["fluency"] == [None] * len(ROWS)
    assert sum(told) == len(ROWS)
    assert found["efficacy"][1] == found["efficacy_exact"][1] == 1.0
    assert found["answer"][1] == "over"
    assert len({v for v in found["efficacy_magnitude"] if v is not None}) > 1


def test_a_fact_that_the_model_says_is_exact_and_its_probability_is_that_of_all_its_tokens(engines):
    engine, _ = engines
    prompt = [5, 9, 11]
    answer = engine.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=4)[0, 3:].tolist()
    (one,) = heard(engine, [Asked(prompt, answer)], batch_size=4)
    assert (one.right, one.agrees, one.divergence) == (1.0, 1.0, 0.0)
    assert one.probability == pytest.approx(probability(engine, prompt, answer), rel=1e-5)
    other = [(answer[0] + 1) % small.VOCABULARY, *answer[1:]]
    (changed,) = heard(engine, [Asked(prompt, other)], batch_size=4)
    assert changed.right == right(engine, prompt, other)
    assert changed.probability < one.probability


def test_a_model_beside_itself_has_changed_nothing(engines):
    found = edit_scores(engines[0], ROWS, base=engines[0], batch_size=8, name="set")
    assert {v for v in found["specificity"] if v is not None} == {1.0}
    assert {v for v in found["divergence"] if v is not None} == {0.0}
    alone = edit_scores(engines[0], ROWS, batch_size=8, name="set")
    assert alone["specificity"] == alone["divergence"] == [None] * len(ROWS)


def test_means_count_the_facts_that_have_something_to_say(engines):
    found = edit_scores(engines[0], ROWS, batch_size=8, name="set")
    summary = means(found)
    assert summary["facts"] == {
        "efficacy": 4,
        "efficacy_exact": 4,
        "efficacy_success": 2,
        "efficacy_magnitude": 2,
        "paraphrase": 2,
        "paraphrase_exact": 2,
        "paraphrase_success": 1,
        "paraphrase_magnitude": 1,
        "neighbour_success": 2,
        "neighbour_magnitude": 2,
    }
    for measure, number in summary["facts"].items():
        values = [v for v in found[measure] if v is not None]
        assert summary[measure] == pytest.approx(sum(values) / number)
    columns = {m: [None] for m in found} | {"efficacy_success": [1.0, 0.5], "paraphrase_success": [0.5, None]}
    assert "score" not in means(columns)
    columns["neighbour_success"] = [None, 0.25]
    assert means(columns)["score"] == pytest.approx(3 / (1 / 0.75 + 1 / 0.5 + 1 / 0.25))
    columns["neighbour_success"] = [0.0, 0.0]
    assert means(columns)["score"] == 0.0


def test_fluency_is_the_weighted_entropy_of_pairs_and_triples():
    assert entropy("a a a a a") == 0.0
    assert entropy("") == entropy("one") == 0.0
    pairs, triples = [1 / 2, 1 / 2], [1.0]  # of "a b, a b": "a b" twice of four, "b ,", ", a"
    pairs, triples = [2 / 4, 1 / 4, 1 / 4], [1 / 3, 1 / 3, 1 / 3]
    bits = [-sum(p * math.log2(p) for p in shares) for shares in (pairs, triples)]
    assert entropy("a b, a b") == pytest.approx((2 / 3 * bits[0] + 4 / 3 * bits[1]) / 2)


def test_fluency_is_of_drawn_text_and_the_same_each_time(engines):
    runs = [edit_scores(engines[0], ROWS, batch_size=n, generate=20, name="set")["fluency"] for n in (1, 8)]
    assert runs[0] == runs[1]
    assert all(f > 1 for f in runs[0])


def test_a_fact_that_fills_the_context_is_named(engines):
    long = FactRow(subject="cat", prompt="the cat " * 40, target="sat")
    with pytest.raises(DatasetError, match=r"set 'set' fact 2: has \d+ tokens with its answer, expected at most .* 64"):
        edit_scores(engines[0], [ROWS[0], long], batch_size=2, name="set")


# ---- evaluate and gate


@pytest.fixture
def measured(workspace, tmp_path):
    def call(**arguments):
        result = evaluate.body(workspace.another(), **{"length": 32, **arguments})
        return result, result.about["sets"]

    return call


@pytest.fixture
def data(tmp_path):
    """A set of pairs, and one of facts."""
    carry([], tmp_path, ROWS)
    (tmp_path / "facts.jsonl").rename(tmp_path / "known.jsonl")
    return {"pairs": small.pairs(tmp_path / "pairs.jsonl", 4), "known": Dataset(str(tmp_path / "known.jsonl"))}


def edited(folder, base, rows, delta=None):
    """A model folder that carries facts, with a change in its weights."""
    whole = load(base)
    add(whole, delta or {})
    whole.save_pretrained(folder)
    small.tokenizer().save_pretrained(folder)
    carry([], folder, rows)
    return Model(str(folder), "e" * 64)


def test_sets_of_facts_and_carried_facts_stand_beside_other_sets(measured, data, folders, tmp_path):
    model = edited(tmp_path / "edited", folders[0], ROWS[1:])
    _, sets = measured(model=model, base=Model(str(folders[1])), data=data, generate=6, max_documents=3)
    assert list(sets) == ["pairs", "known", "carried facts"]
    assert (sets["known"]["documents"], sets["carried facts"]["documents"]) == (3, 3)
    assert sets["carried facts"]["digest"] == digest_of(ROWS[1:])
    engines = [Native(load(f), load_tokenizer(f)) for f in (tmp_path / "edited", folders[1])]
    own = edit_scores(engines[0], ROWS[:3], base=engines[1], batch_size=32, generate=6, name="known")
    for measure, value in means(own).items():
        assert sets["known"][measure] == pytest.approx(value), measure
    assert sets["pairs"].keys() >= {"loss", "chrf"}
    _, sets = measured(model=model, data=data, carried=False)
    assert list(sets) == ["pairs", "known"]
    assert not {"specificity", "divergence", "fluency"} & set(sets["known"])
    _, sets = measured(model=Model(str(folders[0])), data=data)
    assert list(sets) == ["pairs", "known"]


def test_a_change_is_measured_without_a_model_being_written(measured, data, folders, tmp_path):
    row = ROWS[1]
    change = saying(folders[0], row)
    (tmp_path / "delta").mkdir()
    write(change, tmp_path / "delta")
    carry([], tmp_path / "delta", [row])
    base = Model(str(folders[0]), "b" * 64)
    delta = Delta(str(tmp_path / "delta"), "", {"base": "b" * 64})
    before = {n: t.clone() for n, t in load_file(folders[0] / "model.safetensors").items()}
    _, of_delta = measured(model=delta, base=base, data=data)
    written = edited(tmp_path / "written", folders[0], [row], change)
    _, of_model = measured(model=written, base=base, data=data)
    assert of_delta == of_model
    assert of_delta["carried facts"]["efficacy_exact"] == 1.0
    assert all(torch.equal(before[n], t) for n, t in load_file(folders[0] / "model.safetensors").items())
    with pytest.raises(BaseNeeded, match=r"evaluate: base is none, expected the delta's, bbbbbbbbbbbb\. Give"):
        measured(model=delta, data=data)
    with pytest.raises(BaseNeeded, match="base is cccc"):
        measured(model=delta, base=Model(base.uri, "c" * 64), data=data)
    (tmp_path / "delta" / "delta.json").write_text(json.dumps({"base": "b" * 64}))  # of one that no step noted
    with pytest.raises(BaseNeeded, match="base is cccc"):
        measured(model=Delta(delta.uri), base=Model(base.uri, "c" * 64), data=data)
    (said,) = evaluate.problems(
        model=None, base=None, data={"later": None}, resources=None, kinds={"model": (Delta,), "data": (Dataset,)}
    )
    assert said.startswith("base: none is given and model is a delta")


def test_a_gate_refuses_a_model_that_has_lost_an_edit(measured, data, folders, workspace, tmp_path):
    row = FactRow(subject="dog", prompt="the dog ran", target="over", true="to")
    change = saying(folders[0], row)
    edit = edited(tmp_path / "edit", folders[0], [row], change)
    lost = edited(tmp_path / "lost", folders[0], [row], {n: Dense(0.01 * c.whole()) for n, c in change.items()})
    results = {name: measured(model=m, data=data)[0] for name, m in (("edit", edit), ("lost", lost))}
    known = {"on": "carried facts", "measure": "efficacy_exact", "than": 1.0}
    passed = gate.body(workspace.another(), model=edit, results=results, require=[Requirement(better="edit", **known)])
    (noted,) = passed.about["gate"]
    assert noted["said"] == "efficacy_exact of edit on carried facts is 1.0000, where at least 1 is required"
    assert noted["mean"] == noted["low"] == noted["high"] == 0.0
    with pytest.raises(GateClosed, match=r"efficacy_exact of lost on carried facts is 0\.0000, where at least 1 is"):
        gate.body(workspace.another(), model=lost, results=results, require=[Requirement(better="lost", **known)])


def test_facts_that_cannot_be_compared_are_refused(measured, data, folders, tmp_path):
    asked = {
        "model": Model(str(folders[0])),
        "base": None,
        "length": 32,
        "resources": None,
        "kinds": {"model": (Model,)},
    }
    assert list(evaluate.problems(**asked, data=data)) == []
    (said,) = evaluate.problems(**asked, data={"carried facts": data["known"]})
    assert said.startswith("evaluate: data 'carried facts', expected another name")
    other = small.model(vocab_size=310)
    other.save_pretrained(tmp_path / "other")
    small.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(AnotherVocabulary, match="its 310 tokens are not the model's 300, expected the same ones") as e:
        measured(model=Model(str(folders[0])), base=Model(str(tmp_path / "other")), data=data)
    assert str(AnotherVocabulary(*e.value.args)) == str(e.value)


def test_facts_of_parquet_read_the_same(measured, data, folders, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [json.loads(line) for line in data["known"].path.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "known.parquet")
    other = {"known": Dataset(str(tmp_path / "known.parquet"))}
    model = Model(str(folders[0]))
    assert measured(model=model, data=other)[1]["known"] == measured(model=model, data=data)[1]["known"]
