"""Journals and claims."""

import errno
import os
import socket
import subprocess
import sys

import psutil
import pytest

from cluster import processes
from pipelines import lineage
from pipelines.lineage import (
    Event,
    Journal,
    RunIsLive,
    RunTaken,
    UnknownRun,
    driver,
    find_run,
    history,
    new_run,
    runs,
    served,
    sessions,
    states,
    status,
    worked,
)
from pipelines.store import canonical
from tests.pipelines.failing import FailingStorage


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
    claim = {"host": processes.host(), "pid": process.pid, "born": process.create_time()}
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
    claim = {"host": processes.host(), "pid": os.getppid(), "born": 1.0}
    store.storage.put_if_absent("runs/r/claims/000001.json", canonical(claim))
    assert Journal.claim(store.storage, "r").epoch == 2


@pytest.fixture
def away(store, monkeypatch):
    """A run whose driver is on another machine, which may go on while somebody here looks whether it lives."""

    class Away:
        def __init__(self):
            self.lives, self.clock, self.said = True, 0.0, []
            monkeypatch.setattr(lineage.time, "sleep", self.sleep)
            monkeypatch.setattr(lineage.time, "monotonic", lambda: self.clock)
            with monkeypatch.context() as there:
                there.setattr(socket, "gethostname", lambda: "away")
                self.journal = Journal.claim(store.storage, "r")
            self.journal.write([Event("started")])

        def sleep(self, seconds):
            self.clock += seconds
            if self.lives:
                self.journal.beat()

        def claim(self):
            return Journal.claim(store.storage, "r", waiting=self.said.append)

    return Away()


def test_a_driver_of_another_machine_that_lives_keeps_its_run(away):
    with pytest.raises(RunIsLive, match="on away"):
        away.claim()
    assert away.said == ["Run 'r': its driver is on away; seeing for 60 s whether it lives."]


def test_a_driver_of_another_machine_that_is_silent_loses_its_run_and_hears_of_it(away, store):
    away.lives = False
    ours = away.claim()
    assert (away.clock, ours.epoch) == (60.0, 2)
    ours.write([Event("start", "ours")])
    away.journal.write([Event("start", "theirs")])
    with pytest.raises(RunTaken, match=f"process {os.getpid()} on {processes.host()} drives it now"):
        away.journal.beat()
    assert [e.step for e in history(store.storage, "r")] == ["", "ours"]
    ours.beat()


def test_a_run_that_has_ended_on_another_machine_is_taken_at_once(away):
    away.journal.write([Event("finished", data={"status": "failed"})])
    assert away.claim().epoch == 2
    assert (away.clock, away.said) == (0.0, [])


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


def test_a_step_whose_driver_ended_first_was_interrupted_when_that_was_heard_of_last():
    running = [Event("started", time=1.0), Event("start", "a", {}, 2.0), Event("start", "b", {}, 3.0)]
    assert {s.state for s in states(running, ["a", "b"]).values()} == {"running"}
    for events, ended in (
        ([*running, Event("finished", data={"status": "interrupted"}, time=9.0)], 9.0),
        ([*running, Event("started", time=9.0), Event("start", "b", {}, 10.0)], 3.0),
    ):
        found = states(events, ["a", "b"])["a"]
        assert (found.state, found.began, found.ended) == ("interrupted", 2.0, ended)
    assert states(events, ["a", "b"])["b"].state == "running"


def test_what_an_earlier_driver_of_a_run_did_is_done_and_not_reused():
    first = [Event("started", time=1.0), Event("start", "a", {}, 2.0), Event("commit", "a", {"digest": "d"}, 5.0)]
    again = [Event("started", time=100.0), Event("reuse", "a", {"digest": "d"}, 101.0), Event("reuse", "b", {}, 102.0)]
    found = states([*first, *again], ["a", "b"])
    assert (found["a"].state, found["a"].began, found["a"].ended) == ("done", 2.0, 5.0)
    assert (found["b"].state, found["b"].began) == ("reused", 102.0)


def test_neither_pauses_nor_endpoints_count_as_work():
    first = [Event("started", time=1.0), Event("start", "a", {}, 4.0)]
    second = [Event("started", time=100.0), Event("serving", time=110.0), Event("finished", time=500.0)]
    assert worked(first) == 3.0
    assert worked(first, now=9.0) == 8.0
    assert worked([*first, *second]) == 3.0 + 10.0
    assert worked([*first, second[0]], now=103.0) == 3.0 + 3.0
    assert sessions([*first, *second]) == [(1.0, 4.0), (100.0, 110.0)]
    assert sessions([*first, *second[:2]], now=300.0) == [(1.0, 4.0), (100.0, 110.0)]
    assert served([*first, *second]) == 390.0
    assert served([*first, *second[:2]], now=300.0) == 190.0
    assert served(first, now=9.0) == 0.0


def test_what_a_driver_writes_after_the_next_one_s_claim_does_not_count(store):
    first = Journal.claim(store.storage, "r")
    first.write([Event("started"), Event("start", "a")])
    second = Journal.claim(store.storage, "r")
    first.write([Event("commit", "a", {"digest": "late"})])
    second.write([Event("start", "a")])
    third = Journal.claim(store.storage, "r")
    first.write([Event("commit", "a", {"digest": "later"})])
    second.write([Event("commit", "a", {"digest": "late too"})])
    third.write([Event("start", "a"), Event("commit", "a", {"digest": "in time"})])
    events = history(store.storage, "r")
    assert [e.kind for e in events] == ["started", "start", "start", "start", "commit"]
    assert events[-1].data == {"digest": "in time"}
    assert third.attempts("a") == 3


def test_a_driver_that_wrote_nothing_does_not_count(store):
    for _ in range(2):
        Journal.claim(store.storage, "r")
    Journal.claim(store.storage, "r").write([Event("started")])
    assert [e.kind for e in history(store.storage, "r")] == ["started"]


def test_a_journal_whose_packs_are_refused_is_whole(store):
    refusing = FailingStorage(store.storage, ("put_if_absent",), number=3, error=errno.ENOSPC)  # claim, segment, pack
    journal = Journal.claim(refusing, "r")
    journal.write([Event("started"), Event("finished", data={"status": "done"})])
    assert [key for _, key in refusing.calls][2].startswith("runs/r/packs/")
    assert [e.kind for e in history(store.storage, "r")] == ["started", "finished"]
    Journal.claim(store.storage, "r")
    assert [e.kind for e in history(store.storage, "r")] == ["started", "finished"]
