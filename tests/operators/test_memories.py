"""Facts beside a model: made, added to, saved, read in another process, measured."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import lfm
from lfm.errors import HyperparameterError, UnknownName
from lfm.memory.base import OtherMemory
from lfm.memory.grace import GRACE
from operators.artifact import Adapter, Dataset, Memory, Model
from operators.data.facts import FactRow, Neighbour, carried, carry, spoken
from operators.engines.consulting import engine_of
from operators.engines.native import Sampling
from operators.evaluation import evaluate
from operators.memories import remember
from operators.models.memory_files import name_of, read
from tests.operators import small

pytestmark = pytest.mark.slow

METHOD = GRACE(radius=1e-3, steps=20)
FACTS = [
    FactRow("cat", "the cat sat on", "mat", true="it", neighbours=(Neighbour("a dog fell on", "it"),)),
    FactRow("dog", "the dog ran", "over", true="to", neighbours=(Neighbour("the rain ran"),)),
]
MORE = FactRow("rain", "while rain", "fell", true="sat", paraphrases=("it ran while rain",))


def given(folder, rows):
    """Facts as a data set."""
    folder.mkdir()
    carry([], folder, rows)
    (folder / "facts.jsonl").rename(folder / "known.jsonl")
    return Dataset(str(folder / "known.jsonl"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and a memory beside it."""
    root = tmp_path_factory.mktemp("memory")
    model = small.saved(root / "model", seed=3)
    work = small.Work(root / "work")
    memory = remember.body(work, model=model, facts=given(root / "facts", FACTS), method=METHOD)
    return model, memory, work


def said(engine, row):
    """The one token that follows a prompt."""
    prompt, _ = spoken(row.prompt, row.target, engine.tokenizer)
    return engine.tokenizer.decode(engine.complete([prompt], Sampling(max_tokens=1))[0])


def test_a_model_says_its_facts_with_the_memory_and_not_without(made):
    model, memory, work = made
    assert memory.about == {"model": model.digest, "facts": 2, "said": 1.0}
    assert [(line["done"], line["total"], line["said"]) for line in work.told] == [(1, 2, 1.0), (2, 2, 1.0)]
    assert carried(memory.path) == FACTS
    method, state = read(memory)
    assert method == METHOD
    assert state.tensors.keys() == {"keys", "values", "radii"}
    noted = json.loads((memory.path / "memory.json").read_text())
    assert noted["model"] == model.digest
    assert noted["method"]["name"] == "grace"
    with_it, without = engine_of(model, memory), engine_of(model, None)
    for row in FACTS:
        assert said(with_it, row).strip() == row.target
        assert said(without, row).strip() != row.target
    other = spoken("the rain ran to a dog", "it", with_it.tokenizer)[0]
    assert torch.equal(with_it.logits(other), without.logits(other))


def test_another_process_reads_the_same_memory(made, tmp_path):
    model, memory, _ = made
    engine = engine_of(model, memory)
    ids = spoken(FACTS[0].prompt, FACTS[0].target, engine.tokenizer)[0]
    code = (
        "import json, sys; from operators.artifact import Memory, Model; "
        "from operators.engines.consulting import engine_of; "
        "model, memory, digest, ids = sys.argv[1:]; "
        "engine = engine_of(Model(model, digest), Memory(memory)); "
        "print(json.dumps(engine.logits(json.loads(ids)).tolist()))"
    )
    told = [model.uri, memory.uri, model.digest, json.dumps(ids)]
    done = subprocess.run([sys.executable, "-c", code, *told], capture_output=True, text=True, check=True)
    assert torch.equal(torch.tensor(json.loads(done.stdout.splitlines()[-1])), engine.logits(ids))


def test_an_earlier_memory_is_added_to_as_if_all_came_at_once(made, tmp_path):
    model, memory, work = made
    added = remember.body(
        work.another(), model=model, facts=given(tmp_path / "more", [MORE]), memory=memory, method=METHOD
    )
    whole = remember.body(work.another(), model=model, facts=given(tmp_path / "all", [*FACTS, MORE]), method=METHOD)
    assert carried(added.path) == [*FACTS, MORE]
    for name in ("memory.safetensors", "memory.json", "facts.jsonl"):
        assert (added.path / name).read_bytes() == (whole.path / name).read_bytes()
    engine = engine_of(model, added)
    assert [said(engine, row).strip() for row in (*FACTS, MORE)] == ["mat", "over", "fell"]


def test_an_evaluation_consults_the_memory_and_measures_what_it_carries(made, tmp_path):
    model, memory, work = made
    data = {"facts": given(tmp_path / "facts", FACTS), "pairs": small.pairs(tmp_path / "pairs.jsonl", 3)}
    asked = {"model": model, "data": data, "length": 32}
    with_it = evaluate.body(work.another(), **asked, memory=memory).about["sets"]
    without = evaluate.body(work.another(), **asked, base=model).about["sets"]
    assert set(with_it) == {"facts", "pairs", "carried facts"}
    assert with_it["facts"] == with_it["carried facts"]
    assert (with_it["facts"]["efficacy"], with_it["facts"]["efficacy_success"]) == (1.0, 1.0)
    assert (with_it["facts"]["specificity"], with_it["facts"]["divergence"]) == (1.0, 0.0)
    assert without["facts"]["efficacy"] == 0.0
    assert with_it["facts"]["neighbour_magnitude"] == without["facts"]["neighbour_magnitude"]
    assert with_it["pairs"] == without["pairs"]


def test_a_memory_stays_beside_its_own_model(made, tmp_path):
    model, memory, work = made
    facts = given(tmp_path / "facts", FACTS)
    other = replace(model, digest="o" * 64)
    for call in (
        lambda: remember.body(work.another(), model=other, facts=facts, memory=memory, method=METHOD),
        lambda: evaluate.body(work.another(), model=other, memory=memory, data={"facts": facts}, length=32),
        lambda: engine_of(other, memory),
    ):
        with pytest.raises(
            OtherMemory, match=r"it is kept beside dddddddddddd, expected model oooooooooooo\. Give the"
        ):
            call()
    adapter = Adapter(str(tmp_path), about={"base": model.digest})
    with pytest.raises(OtherMemory, match=r"it is given with 'adapter', expected the model that it was made for"):
        evaluate.body(work.another(), model=adapter, base=model, memory=memory, data={"facts": facts}, length=32)
    with pytest.raises(OtherMemory, match=r"it has no memory.json, expected a folder with one"):
        engine_of(model, Memory(str(tmp_path)))
    (tmp_path / "memory.json").write_text("{}")
    with pytest.raises(OtherMemory, match="does not say how it is read") as caught:
        engine_of(model, Memory(str(tmp_path)))
    assert str(OtherMemory(*caught.value.args)) == str(caught.value)
    with pytest.raises(HyperparameterError, match="GRACE: layer=2, expected layer < 2"):
        remember.body(work.another(), model=model, facts=facts, method=GRACE(layer=2))


def test_every_memory_of_the_file_tree_can_be_read_and_no_other():
    assert [f"memory/{name_of(lfm.find(n)())}" for n in lfm.names("memory")] == list(lfm.names("memory"))

    class Mine(GRACE):
        """A user's own."""

    with pytest.raises(UnknownName, match=r"No memory method that .* is called 'Mine'\. Known: memory/grace\."):
        name_of(Mine())
    (said,) = remember.problems(model=None, facts=None, memory=None, method=Mine(), resources=None)
    assert said.startswith("No memory method that can be read is called 'Mine'")


def test_a_plan_hears_of_everything_at_once(made, tmp_path):
    model, memory, _ = made
    facts, pairs = given(tmp_path / "facts", FACTS), small.pairs(tmp_path / "pairs.jsonl", 3)
    asked = {"method": METHOD, "resources": None}
    assert list(remember.problems(model=model, facts=facts, memory=memory, **asked)) == []
    assert list(remember.problems(model=None, facts=None, memory=None, **asked)) == []
    other = replace(model, digest="o" * 64)
    asked["method"] = GRACE(layer=7)
    found = list(remember.problems(model=other, facts=pairs, memory=memory, **asked))
    assert [sentence.split(",")[0] for sentence in found] == [
        "GRACE: layer=7",
        f"facts: {pairs.uri} has the columns 'prompt'",
        f"memory {memory.uri!r}: it is kept beside dddddddddddd",
    ]
    (said,) = evaluate.problems(
        model=None, base=None, memory=memory, data={"facts": facts}, length=32, resources=None,
        kinds={"model": (Adapter,), "base": (Model,)},
    )  # fmt: skip
    assert "it is given with 'adapter'" in said
