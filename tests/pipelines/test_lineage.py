"""Journals, claims and ancestry."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from pipelines.lineage import (
    Event,
    Journal,
    RunIsLive,
    UnknownArtifact,
    UnknownRun,
    ancestry,
    driver,
    find_artifact,
    find_run,
    history,
    new_run,
    runs,
    states,
    status,
)
from pipelines.store import Result, canonical


def test_events_come_back_in_order_over_several_drivers(store):
    first = Journal.claim(store.storage, "r")
    first.write([Event("started"), Event("start", "a")])
    first.write([Event("commit", "a", {"digest": "d"}, 2.0)])
    second = Journal.claim(store.storage, "r")
    assert second.attempts("a") == 1
    second.write([Event("start", "b")])
    assert [e.kind for e in history(store.storage, "r")] == ["started", "start", "commit", "start"]
    assert (first.epoch, second.epoch) == (1, 2)


def claim_as(store, run, process):
    claim = {"host": socket.gethostname(), "pid": process.pid, "born": process.create_time()}
    store.storage.put_if_absent(f"runs/{run}/claims/000001.json", canonical(claim))


def test_a_run_whose_driver_lives_is_not_taken(store):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        claim_as(store, "r", psutil.Process(other.pid))
        with pytest.raises(RunIsLive, match=str(other.pid)):
            Journal.claim(store.storage, "r")
        assert driver(store.storage, "r") == other.pid
        other.communicate(b"\n")
    assert Journal.claim(store.storage, "r").epoch == 2


def test_a_process_that_got_a_dead_drivers_number_is_not_it(store):
    claim = {"host": socket.gethostname(), "pid": os.getppid(), "born": 1.0}
    store.storage.put_if_absent("runs/r/claims/000001.json", canonical(claim))
    assert Journal.claim(store.storage, "r").epoch == 2


def test_a_run_is_found_by_a_part_of_its_name(store):
    for name in ("20260101-a-1111", "20260102-b-2222"):
        Journal.claim(store.storage, name).write([Event("started", data={"steps": {}})])
    assert runs(store.storage) == ("20260101-a-1111", "20260102-b-2222")
    assert find_run(store.storage, "last") == "20260102-b-2222"
    assert find_run(store.storage, "1111") == "20260101-a-1111"
    with pytest.raises(UnknownRun, match=r"No run is called '2026'. The last ones: 20260101-a-1111"):
        find_run(store.storage, "2026")


def test_names_of_runs_differ():
    assert len({new_run("p") for _ in range(100)}) == 100


def test_a_run_without_an_end_and_without_a_driver_was_interrupted(store):
    Journal.claim(store.storage, "r").write([Event("started")])
    assert status(store.storage, "r", history(store.storage, "r")) == "interrupted"
    Journal.claim(store.storage, "r").write([Event("finished", data={"status": "done"})])
    assert status(store.storage, "r", history(store.storage, "r")) == "done"


def test_a_step_that_failed_and_then_succeeded_is_done():
    events = [Event("start", "a", {}, 1.0), Event("fail", "a", {}, 2.0), Event("start", "a", {}, 3.0),
              Event("commit", "a", {"digest": "d"}, 4.0)]  # fmt: skip
    found = states(events, ["a", "b"])
    assert (found["a"].state, found["a"].attempts, found["a"].began, found["a"].ended) == ("done", 2, 3.0, 4.0)
    assert found["b"].state == "waiting"


def put(store, step, digest, inputs):
    components = {"operator": "make", "method": None}
    store.commit(
        Result(fingerprint=step, kind="dataset", digest=digest, step=step, inputs=inputs, components=components)
    )


def test_ancestry_goes_down_to_the_data_and_opens_nothing_twice(store):
    text = {"kind": "dataset", "digest": "d-text", "uri": "/data/text"}

    def of(digest):
        return {"kind": "dataset", "digest": digest, "uri": ""}

    put(store, "a", "d-a", {"data": text})
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
    assert json.dumps([a.digest for a in found])


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
