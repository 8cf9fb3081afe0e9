"""Searches on Ray: what trials share, what becomes of those that fail, and what a search that was broken off does."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from cluster.pool import Pool
from operators.catalog import Catalog
from operators.code import bring
from pipelines.beginning import started
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Journal, history, states, trials
from pipelines.plan import plan
from pipelines.run import run
from pipelines.source import pack
from pipelines.spec import load
from pipelines.tracking.outbox import entries
from tests.pipelines import searched

pytestmark = pytest.mark.ray


@pytest.fixture
def sought(tmp_path, store, ray_local):
    """Runs the pipeline with changes, on a cluster that others may use too: its trials take turns.

    ``made`` is the file that tells how often its base was made.
    """
    folder = tmp_path / "sought"
    folder.mkdir()
    made = searched.write(folder)

    def start(*changes, mlflow="none"):
        code = pack(folder, ("sought.py",))
        catalog = Catalog(bring(code, str(folder)))
        spec = load((folder / "pipeline.yaml").read_text(), catalog=catalog, code=code, changes=changes)
        planned = plan(spec, Looks(Path(store.storage.uri) / "inputs.sqlite", store), catalog)
        journal = Journal.claim(store.storage, "one")
        journal.write([started(planned, "one", retries=0, mlflow=mlflow, address="auto", priority=2)])
        said = run(planned, store, journal, connect=lambda: nullcontext(Pool(shared=True)))
        (left,) = store.storage.list("ledgers")
        assert json.loads(store.storage.read(left))["claims"] == {}
        return said, states(history(store.storage, "one"), planned.steps)

    start.made = made
    return start


def test_trials_share_what_they_have_in_common_and_a_broken_off_search_goes_on_with_them(sought, store):
    said, steps = sought("part.refused=4", mlflow="sqlite:////nowhere")
    assert said == "done"
    assert sought.made.read_text() == "x"  # the base was made before the search, and by no trial
    found = steps["found"].data["about"]["search"]
    done = [t for t in found["trials"] if t["state"] == "done"]
    assert found["trials"][0]["changes"] == {"part.by": 1.0, "part.times": 1}
    assert found["trials"][0]["values"] == [2.0]
    for one in done[1:]:
        assert one["values"] == [abs(one["changes"]["part.by"] * one["changes"]["part.times"] - 3)]
        assert (one["computed"], one["reused"]) == (2, 1)
    failed = [t for t in found["trials"] if t["state"] == "failed"]
    assert {(t["changes"]["part.times"], t["error"]) for t in failed} == {(4, "part: asked to fail")}
    best = min(done, key=lambda t: t["values"][0])
    assert found["best"] == best["run"]
    made = [e.data["digest"] for e in history(store.storage, best["run"]) if (e.kind, e.step) == ("commit", "part")]
    assert [steps["found"].data["digest"]] == made
    assert steps["after"].data["about"]["sets"]["text"]["loss"] == best["values"][0]
    fingerprint = history(store.storage, "one")[0].data["steps"]["found"]["fingerprint"]
    assert store.result(fingerprint).inputs["best"]["digest"] == made[0]
    names = trials(store.storage, "one", "found")
    assert {t["run"] for t in found["trials"]} == {"", *names}
    assert entries(store.storage).keys() == {*names}  # MLflow will hear of each
    assert {history(store.storage, n)[0].data["priority"] for n in names} == {2}

    # As if it had been killed: one trial had ended, one had not, and of the others nothing had begun.
    ended, open_, *others = sorted(names, key=lambda n: history(store.storage, n)[0].time)
    for name in others:
        store.storage.delete(f"runs/{name}")
    for key in store.storage.list(f"runs/{open_}"):
        if "/packs/" in key or key.endswith("-000003.json"):
            store.storage.delete(key)
    store.storage.delete(f"results/{fingerprint}.json")
    said, steps = sought("part.refused=4")
    assert said == "done"
    again = steps["found"].data["about"]["search"]
    assert {ended, open_} < {t["run"] for t in again["trials"]}
    assert len(again["trials"]) == len(found["trials"]) == 6  # what is drawn then was not drawn before
    assert len(store.storage.list(f"runs/{ended}/claims")) == 1  # nobody has run it again
    assert sought.made.read_text() == "x"


def test_a_grid_takes_each_point_once_stops_the_worst_on_the_way_and_knows_the_front(sought, store):
    objectives = [
        {"on": "text", "measure": "loss", "direction": "minimize"},
        {"measure": "size", "direction": "minimize"},
    ]
    said, steps = sought(
        "found.space={part.by: {choice: [1.0, 2.0, 9.0]}}",  # the last one goes on for ever
        "found.stop={step: part, measure: away, first: 1, last: 64}",
        "found.sampler=grid",
        "found.concurrency=1",
        f"found.objectives={json.dumps(objectives)}",
    )
    assert said == "done"
    found = steps["found"].data["about"]["search"]
    rows = [(t["changes"]["part.by"], t["state"], t["values"]) for t in found["trials"]]
    assert rows == [(1.0, "done", [2.0, 1.0]), (2.0, "done", [1.0, 2.0]), (9.0, "stopped", [])]
    first, second, stopped = (t["run"] for t in found["trials"])
    assert (found["best"], found["front"]) == (second, [first, second])
    assert steps["after"].data["about"]["sets"]["text"]["loss"] == 1.0
    assert history(store.storage, stopped)[-1].data == {"status": "stopped"}
