"""Populations on Ray: who takes whose weights, what that makes, and what becomes of one that was broken off."""

import json
import operator
from pathlib import Path

import pytest

from operators.catalog import Catalog
from operators.code import bring
from pipelines.beginning import started
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Journal, history, states, trials
from pipelines.plan import plan
from pipelines.run import run
from pipelines.source import pack
from pipelines.spec import load
from tests.pipelines import trained

pytestmark = pytest.mark.ray


@pytest.fixture
def sought(tmp_path, store, ray_local):
    """Runs the pipeline with changes."""
    folder = tmp_path / "trained"
    folder.mkdir()
    trained.write(folder)
    code = pack(folder, ("trained.py",))
    catalog = Catalog(bring(code, str(folder)))

    def start(*changes, name="one", until=""):
        spec = load((folder / "pipeline.yaml").read_text(), catalog=catalog, code=code, changes=changes)
        planned = plan(spec, Looks(Path(store.storage.uri) / "inputs.sqlite", store), catalog, until=until)
        journal = Journal.claim(store.storage, name)
        journal.write([started(planned, name, retries=0, mlflow="none", address="local")])
        said = run(planned, store, journal, connect=ray_local)
        return said, states(history(store.storage, name), planned.steps)

    return start


def told(events, kind, step):
    return [e.data for e in events if (e.kind, e.step) == (kind, step)]


def test_the_worst_go_on_from_the_best_and_a_population_that_was_broken_off_does_the_same_again(sought, store):
    said, steps = sought()
    assert said == "done"
    found = steps["found"].data["about"]["search"]
    first, *rows = found["trials"]
    assert (first["values"], len(rows)) == ([pytest.approx(2.94, abs=0.01)], 3)
    assert [row["state"] for row in rows] == ["done"] * 3
    assert found["best"] == min(rows, key=lambda row: row["values"][0])["run"]
    assert store.storage.list("checkpoints") == ()

    # Of three the worst one takes the best one's place at each of two rests; what it is told, who trained it knows.
    names = trials(store.storage, "one", "found")
    changes = {n: history(store.storage, n)[0].data["trial"]["changes"] for n in names}
    rests = [[c for c in changes.values() if c.get("part.rest_at") == at] for at in (2, 4)]
    assert [len(some) for some in rests] == [3, 3]
    starts = sorted(c["part.learning_rate"] for c in rests[0])
    assert len({*starts}) == 3
    assert {starts[0]} == {*starts} - {c["part.learning_rate"] for c in rests[1]}  # the slowest is gone
    for row in rows:
        midway = row["changes"]["part.midway"]
        assert [change["at"] for change in midway] == [2, 4]
        moved = [change["values"]["learning_rate"] for change in midway if change["values"]]
        assert all(0.001 <= rate <= 1.0 for rate in moved)
    for name, own in changes.items():
        events = history(store.storage, name)
        if "part.rest_at" in own:
            assert [e["class"] for e in told(events, "fail", "part")] == ["rested"]
            assert events[-1].data == {"status": "stopped"}
        else:  # the last part of it alone
            (end,) = told(events, "commit", "part")
            lines = store.storage.read(f"runs/{name}/measures/part/1.jsonl").splitlines()
            assert (end["about"]["steps"], len(lines)) == (6, 2)

    # Written into the pipeline by hand, its history makes the same number, from the beginning and in one go.
    best = changes[found["best"]]
    fingerprint = history(store.storage, found["best"])[0].data["steps"]["part"]["fingerprint"]
    store.storage.delete(f"results/{fingerprint}.json")
    by_hand = [f"{key}={json.dumps(value)}" for key, value in best.items()]
    _, again = sought(*by_hand, name="two", until="part")
    assert again["part"].state == "done"
    assert again["part"].data["digest"] == steps["found"].data["digest"]

    # As if it had been killed: one had ended, one rested for the last time, and of the others nothing had begun.
    ended = next(n for n in names if "part.rest_at" not in changes[n])
    open_ = next(n for n in names if changes[n].get("part.rest_at") == 4)
    for name in {*names} - {ended, *(n for n in names if changes[n].get("part.rest_at") == 2)}:
        if name != open_:
            store.storage.delete(f"runs/{name}")
    fingerprint = history(store.storage, "one")[0].data["steps"]["found"]["fingerprint"]
    store.storage.delete(f"results/{fingerprint}.json")
    said, steps = sought()
    assert said == "done"
    once_more = steps["found"].data["about"]["search"]
    key = operator.itemgetter("run")
    bare = [[{k: row[k] for k in ("run", "changes", "values")} for row in sorted(some, key=key)]
            for some in (found["trials"], once_more["trials"])]  # fmt: skip
    assert bare[0] == bare[1]
    assert trials(store.storage, "one", "found") == names
    assert len(store.storage.list(f"runs/{ended}/claims")) == 1  # nobody has run it again
