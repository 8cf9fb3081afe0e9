"""What an artifact came from."""

import json

import pytest

from operators.catalog import Catalog
from operators.code import bring
from pipelines.__main__ import main
from pipelines.ancestry import UnknownArtifact, ancestry, find_artifact, find_maker, recorded, sources
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Event, Journal
from pipelines.plan import plan
from pipelines.run import run
from pipelines.source import pack
from pipelines.spec import load
from pipelines.store import Result

TEXT = {"kind": "dataset", "digest": "d-text", "uri": "/data/text"}


def of(digest, kind="model"):
    return {"kind": kind, "digest": digest, "uri": ""}


def put(store, step, digest, inputs, *, known=None, kind="model", run="r"):
    """Commit a result; `known` are the fingerprints of its inputs, as a plan writes them."""
    components = {"operator": "make", "method": None, **({"inputs": known} if known else {})}
    store.commit(
        Result(fingerprint=step, kind=kind, digest=digest, run=run, step=step, inputs=inputs, components=components)
    )


def steps(found):
    return [(a.depth, a.role, a.made_by.step if a.made_by else a.uri) for a in found]


def test_ancestry_goes_down_to_the_data_and_opens_nothing_twice(store):
    put(store, "a", "d-a", {"data": TEXT})
    put(store, "b", "d-b", {"data": [of("d-a"), of("d-a")]})
    put(store, "c", "d-c", {"data": {"one": of("d-b")}})
    found = ancestry(store, "d-c")
    assert [(a.depth, a.role, a.digest, a.uri) for a in found] == [
        (0, "", "d-c", ""),
        (1, "data.one", "d-b", ""),
        (2, "data[0]", "d-a", ""),
        (3, "data", "d-text", "/data/text"),
        (2, "data[1]", "d-a", ""),
    ]
    assert [a.kind for a in found] == ["model", "model", "model", "dataset", "model"]


@pytest.mark.parametrize("knows", [True, False], ids=["with fingerprints", "by digests alone"])
def test_what_a_gate_let_through_comes_from_what_made_it(store, knows):
    """Gate and merge have results of one digest; the gate's input is that very digest."""
    put(store, "merge", "d-merged", {"experts": [TEXT]})
    put(store, "measure", "d-metrics", {"model": of("d-merged")}, known=knows and {"model": ["merge"]}, kind="metrics")
    known = {"model": ["merge"], "results": {"merged": "measure"}}
    inputs = {"model": of("d-merged"), "results": {"merged": of("d-metrics", "metrics")}}
    put(store, "gate", "d-merged", inputs, known=knows and known)
    assert steps(ancestry(store, "d-merged")) == [
        (0, "", "gate"),
        (1, "model", "merge"),
        (2, "experts[0]", "/data/text"),
        (1, "results.merged", "measure"),
        (2, "model", "merge"),
    ]


def test_of_two_gates_in_a_row_the_second_comes_first(store):
    put(store, "merge", "d", {"data": TEXT})
    put(store, "after", "d", {"model": of("d")}, known={"model": ["before"]})
    put(store, "before", "d", {"model": of("d")}, known={"model": ["merge"]})
    assert [s for _, _, s in steps(ancestry(store, "d"))] == ["after", "before", "merge", "/data/text"]


def test_a_step_that_took_the_ungated_model_did_not_take_the_gate_s(store):
    put(store, "merge", "d", {"data": TEXT})
    put(store, "gate", "d", {"model": of("d")}, known={"model": ["merge"]})
    put(store, "other", "d-other", {"model": of("d")}, known={"model": ["merge"]})
    assert [s for _, _, s in steps(ancestry(store, "d-other"))] == ["other", "merge", "/data/text"]


def test_a_maker_whose_result_was_replaced_is_not_claimed(store):
    put(store, "merge", "d-new", {"data": TEXT})
    put(store, "tune", "d-tuned", {"model": of("d-old")}, known={"model": ["merge"]})
    (_, before) = ancestry(store, "d-tuned")
    assert (before.digest, before.made_by) == ("d-old", None)


def test_a_stored_artifact_as_an_input_is_followed(store):
    put(store, "merge", "d", {"data": TEXT})
    put(store, "tune", "t", {"model": {**of("d"), "uri": "lfm://d"}}, known={"model": ["model:d"]})
    assert [s for _, _, s in steps(ancestry(store, "t"))] == ["tune", "merge", "/data/text"]


def test_an_artifact_is_found_by_run_and_step_and_by_how_its_digest_begins(store):
    folder = store.storage.scratch()
    (folder / "x.txt").write_text("x")
    digest = store.put(folder, "dataset", {})
    journal = Journal.claim(store.storage, "r")
    journal.write([Event("started", data={"steps": {}}), Event("commit", "a", {"digest": digest})])
    for name in ("r/a", "last/a", "a", digest[:8], digest):
        assert find_artifact(store, name) == digest
    for name in ("r/b", "b", digest[:3], "ffffffff"):
        with pytest.raises(UnknownArtifact, match="names no artifact"):
            find_artifact(store, name)
    assert find_maker(store, digest) is None
    assert [a.kind for a in ancestry(store, digest)] == ["dataset"]


@pytest.fixture
def ran(project, store, ray_local, tmp_path):
    """A diamond that has run."""
    spec, catalog = project.spec()
    made = plan(spec, Looks(tmp_path / "inputs.sqlite", store), catalog)
    journal = Journal.claim(store.storage, "one")
    inputs = {n: {"kind": "dataset", "uri": a.uri, "digest": a.digest} for n, a in made.inputs.items()}
    planned = {n: {"fingerprint": s.fingerprint, "components": s.components,
                   "inputs": {e: list(r) for e, r in s.inputs.items()}} for n, s in made.steps.items()}  # fmt: skip
    journal.write([Event("started", data={"steps": planned, "inputs": inputs})])
    assert run(made, store, journal, connect=ray_local) == "done"
    return made


@pytest.mark.ray
def test_a_journal_knows_of_each_step_what_its_result_says(store, ran):
    for step, said in recorded(store.storage, "one").items():
        result = store.result(ran.steps[step].fingerprint)
        assert (said.digest, said.kind, said.about) == (result.digest, result.kind, result.about)
        assert list(sources(said)) == list(sources(result))
    (_, _, maker), *_ = sources(store.result(ran.steps["d"].fingerprint))
    assert maker == ran.steps["b"].fingerprint
    assert find_maker(store, "last/c").step == "c"


@pytest.mark.ray
def test_the_command_prints_a_digest_on_every_line(store, ran, capsys):
    assert main(["lineage", "last/d", "--store", store.storage.uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = ancestry(store, find_artifact(store, "last/d"))
    assert len(lines) == len(found) == 6
    for line, one in zip(lines, found, strict=True):
        assert line.endswith(f" digest {one.digest}")
        assert len(one.digest) == 64
    assert "text.txt digest" in lines[3]
    assert main(["lineage", "last/d", "--store", store.storage.uri, "--json"]) == 0
    assert [a["digest"] for a in json.loads(capsys.readouterr().out)] == [a.digest for a in found]


def test_a_line_about_what_the_store_has_forgotten_says_so(store, capsys):
    folder = store.storage.scratch()
    (folder / "x.txt").write_text("x")
    digest = store.put(folder, "dataset", {})
    put(store, "b", digest, {"data": of("d-gone", "dataset")}, kind="dataset")
    assert main(["lineage", digest, "--store", store.storage.uri]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "  data: dataset of a step that the store has forgotten digest d-gone"


HANDING = """
name: handing
uses: [noop.py, handing.py]
inputs:
  text: {dataset: TEXT}
steps:
  a: {operator: hand_on, inputs: {data: text}}
  b: {operator: noop, inputs: {after: [a]}}
"""
HAND_ON = """
from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace

@operator()
def hand_on(work: Workspace, *, data: Dataset) -> Dataset:
    return data
"""


@pytest.mark.ray
def test_an_input_from_outside_that_a_step_hands_on_is_taken_by_the_next(project, store, ray_local, tmp_path):
    (project.folder / "handing.py").write_text(HAND_ON)
    code = pack(project.folder, ("noop.py", "handing.py"))
    catalog = Catalog(bring(code, str(project.folder)))
    text = project.folder / "text.txt"
    spec = load(HANDING.replace("TEXT", str(text)), source="handing.yaml", catalog=catalog, code=code)
    made = plan(spec, Looks(tmp_path / "inputs.sqlite", store), catalog)
    for name, connect in (("one", ray_local), ("two", None)):
        assert run(made, store, Journal.claim(store.storage, name), connect=connect) == "done"
    found = ancestry(store, store.result(made.steps["b"].fingerprint).digest)
    assert steps(found) == [(0, "", "b"), (1, "after[0]", "a"), (2, "data", str(text))]
    assert found[1].digest == found[2].digest == made.inputs["text"].digest
