"""What runs of one cluster enter in its ledger: who gets what when many do so at once, die, or cannot reach storage."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Barrier

import pytest

from cluster import processes
from cluster.capacity import Capacity, Node
from operators.resources import Resources
from pipelines.ledger import BEAT_S, LEASE_S, TURN_S, Turns
from pipelines.lineage import Journal, history, states
from pipelines.run import run
from pipelines.store import canonical
from tests.pipelines.failing import Clock, FailingStorage, FakePool, fast
from tests.pipelines.graphs import Step, planned

KEY = "ledgers/c.json"
THERE = Capacity(cpus=8, gpus=4)
GPU = Resources(gpus_per_worker=1, accelerator="gpu")
ALL = Resources(gpus_per_worker=4, accelerator="gpu")


class Hands:
    """A clock that stands still until it is set."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Hands()


def turns(storage, run, clock, **options):
    return Turns(storage, "c", run, clock=clock, **options)


def ledger(storage):
    return json.loads(storage.read(KEY))


def test_what_one_holds_the_other_gets_when_it_is_released(either_store, clock):
    one, two = (turns(either_store.storage, name, clock) for name in ("one", "two"))
    assert set(one.take({"a": ALL}, THERE)) == {"a"}
    assert set(two.take({"b": ALL}, THERE)) == set()
    assert two.behind == {"b": ("one",)}
    clock.now += 10
    one.release("a")
    one.take({}, THERE)
    assert set(two.take({"b": ALL}, THERE)) == {"b"}
    assert ledger(either_store.storage)["served"] == {"one": {"gpu": 40, "cpu": 0}, "two": {"gpu": 0, "cpu": 0}}
    one.leave()
    two.leave()
    assert ledger(either_store.storage)["claims"] == {}


def test_it_is_said_when_a_machine_was_found_for_what_needs_much_of_one(store, clock):
    there = Capacity.of([Node(cpus=4, gpus=2)] * 2)
    one, two = (turns(store.storage, name, clock) for name in ("one", "two"))
    one.take({"a": replace(GPU, gpus_per_worker=2)}, there)
    assert set(two.take({"b": GPU}, there, unplaced={"b"})) == set()
    one.take({}, there, unplaced={"a"})
    clock.now += TURN_S
    assert set(two.take({"b": GPU}, there)) == set()
    one.take({}, there)
    clock.now += TURN_S
    assert set(two.take({"b": GPU}, there)) == {"b"}


def test_who_waits_reads_now_and_then_and_writes_only_what_is_new(store, clock):
    counted = FailingStorage(store.storage, ("read", "put_if_absent", "replace_if_match"))
    turns(store.storage, "one", clock).take({"a": ALL}, THERE)
    two = turns(counted, "two", clock)
    for _ in range(20):
        assert set(two.take({"b": ALL}, THERE)) == set()
        clock.now += TURN_S / 4
    assert [verb for verb, _ in counted.calls] == ["read", "replace_if_match", *["read"] * 4]
    clock.now += BEAT_S
    two.take({"b": ALL}, THERE)
    assert counted.calls[-1] == ("replace_if_match", KEY), "it says that it lives"


def test_many_that_write_at_the_same_moment_lose_nothing_and_get_no_more_than_there_is(store):
    meet = Barrier(4)

    def enter(name):
        clock, got = Hands(), set()
        mine = turns(store.storage, name, clock)
        for _ in range(5):
            meet.wait()
            got |= set(mine.take({s: GPU for s in "abc" if s not in got}, THERE))
            clock.now += TURN_S
        return got

    names = [f"run{i}" for i in range(4)]
    with ThreadPoolExecutor(len(names)) as pool:
        got = dict(zip(names, pool.map(enter, names), strict=True))
    claims = ledger(store.storage)["claims"]
    assert {name: {g["step"] for g in claim["holds"]} for name, claim in claims.items()} == got
    assert sum(map(len, got.values())) == 4
    numbers = [g["number"] for c in claims.values() for g in (*c["wants"], *c["holds"])]
    assert sorted(numbers) == list(range(12))


def entry(run, **by):
    """What a run of another process has entered that holds all there is."""
    dead = {"host": processes.host(), "pid": os.getpid(), "born": 1.0, **by}
    gang = {"step": "a", "asks": {"gpus_per_worker": 4.0, "accelerator": "gpu"}, "number": 0}
    return {"claims": {run: {"account": run, "holds": [gang], "by": dead}}, "served": {run: {"gpu": 9.0}}, "next": 1}


def test_the_claim_of_a_dead_process_goes_at_once(store, clock):
    store.storage.put_if_absent(KEY, canonical(entry("dead")))
    assert set(turns(store.storage, "one", clock).take({"a": ALL}, THERE)) == {"a"}
    assert ledger(store.storage)["claims"].keys() == {"one"}


def test_the_claim_of_another_machine_goes_when_it_has_been_silent(store, clock):
    store.storage.put_if_absent(KEY, canonical(entry("away", host="elsewhere")))
    one = turns(store.storage, "one", clock)
    assert set(one.take({"a": ALL}, THERE)) == set()
    clock.now += LEASE_S
    assert set(one.take({"a": ALL}, THERE)) == set()
    there = ledger(store.storage)
    there["claims"]["away"]["beat"] = 1
    assert store.storage.replace_if_match(KEY, canonical(there), store.storage.read(KEY))
    clock.now += LEASE_S
    assert set(one.take({"a": ALL}, THERE)) == set(), "it has said something since"
    clock.now += LEASE_S + TURN_S
    assert set(one.take({"a": ALL}, THERE)) == {"a"}


def test_who_was_taken_for_dead_enters_again_what_still_runs(store, clock, monkeypatch):
    one, two = (turns(store.storage, name, clock) for name in ("one", "two"))
    one.take({"a": ALL}, THERE)
    two.take({"b": ALL}, THERE)
    clock.now += LEASE_S + 1
    assert set(two.take({"b": ALL}, THERE)) == {"b"}
    one.take({}, THERE)
    assert {n: len(c["holds"]) for n, c in ledger(store.storage)["claims"].items()} == {"one": 1, "two": 1}
    assert set(one.take({"c": GPU}, THERE)) == set(), "what is held twice is held"


def test_a_storage_that_fails_starts_nothing_and_ends_nothing(store, clock):
    failing = FailingStorage(store.storage, ("read", "replace_if_match"), number=4, error=errno.EIO, lasting=True)
    one = turns(failing, "one", clock)
    assert set(one.take({"a": GPU}, THERE)) == {"a"}
    assert set(one.take({"b": GPU}, THERE)) == {"b"}
    for _ in range(5):
        assert set(one.take({"c": GPU}, THERE)) == set()
        clock.now += TURN_S
    one.release("a")
    failing.number = 0
    assert set(one.take({"c": GPU}, THERE)) == {"c"}
    assert [g["step"] for g in ledger(store.storage)["claims"]["one"]["holds"]] == ["b", "c"]


def test_the_higher_priority_gets_what_comes_free(store, clock):
    one, low, high = (turns(store.storage, n, clock, priority=p) for n, p in (("one", 0), ("low", 0), ("high", 1)))
    one.take({"a": ALL}, THERE)
    low.take({"b": ALL}, THERE)
    high.take({"c": ALL}, THERE)
    one.release("a")
    one.take({}, THERE)
    clock.now += TURN_S
    assert (set(low.take({"b": ALL}, THERE)), low.behind) == (set(), {"b": ("high",)})
    assert set(high.take({"c": ALL}, THERE)) == {"c"}


def test_trials_are_served_as_the_run_that_searches(store, clock):
    trial, other = turns(store.storage, "s~found~1", clock), turns(store.storage, "o", clock)
    turns(store.storage, "s", clock).take({}, THERE)
    trial.take({"a": ALL}, THERE)
    other.take({"b": ALL}, THERE)
    assert other.behind == {"b": ("s",)}
    clock.now += 10
    trial.release("a")
    trial.leave()
    assert ledger(store.storage)["served"]["s"] == {"gpu": 40, "cpu": 0}


class Kept(dict):
    """A storage in memory."""

    read = dict.get

    def put_if_absent(self, key, data):
        return self.setdefault(key, data) is data

    def replace_if_match(self, key, data, old):
        if self.get(key) == old:
            self[key] = data
        return self[key] is data


def test_those_that_look_now_and_then_and_say_late_how_long_they_were_served_share_evenly(clock):
    kept, there, spent = Kept(), Capacity.of([Node(cpus=4, gpus=4)]), {"a": 0.0, "b": 0.0}
    steps = {"a": (GPU, 3), "b": (replace(GPU, gpus_per_worker=2), 45)}
    mine = {name: turns(kept, name, clock) for name in steps}
    waits = {name: {str(i): asks for i in range(9)} for name, (asks, _) in steps.items()}
    ends = {name: {} for name in steps}
    for _ in range(600):
        for name, (asks, seconds) in steps.items():
            for step in [s for s, end in ends[name].items() if end <= clock.now]:
                del ends[name][step]
                mine[name].release(step)
                waits[name][step] = asks
            for step in mine[name].take(dict(waits[name]), there):
                del waits[name][step]
                ends[name][step] = clock.now + seconds
            spent[name] += asks.gpus * len(ends[name])
        clock.now += 0.5
    assert min(spent.values()) >= 0.4 * sum(spent.values()), spent


GRAPH = {"a": Step(), "b": Step(word="y")}


def drive(store, clock, passed, name="one"):
    """Have a run drive two steps on a cluster that others use too, and say what happened."""
    clock.passed = passed
    with fast(clock):
        said = run(
            planned(GRAPH),
            store,
            Journal.claim(store.storage, name),
            connect=lambda: nullcontext(FakePool(clock, name="c")),
        )
    return said, history(store.storage, name)


def test_a_run_waits_for_its_turn_says_so_once_and_leaves_nothing(store):
    other = entry("other", host="elsewhere")
    other["claims"]["other"]["holds"][0]["asks"] = {"cpus_per_worker": 8.0}
    store.storage.put_if_absent(KEY, canonical(other))
    clock, goes = Clock(), []

    def passed():
        goes.append(clock.now)
        if len(goes) == 30:  # the other one's step ends
            there = ledger(store.storage)
            there["claims"]["other"]["holds"] = []
            assert store.storage.replace_if_match(KEY, canonical(there), store.storage.read(KEY))

    said, events = drive(store, clock, passed)
    assert said == "done"
    waits = [e for e in events if e.kind == "wait"]
    assert {e.step: e.data for e in waits} == {
        s: {"why": "its turn on the cluster comes after run other", "behind": ["other"]} for s in "ab"
    }
    assert len(waits) == 2
    assert {s.state for s in states(events, GRAPH).values()} == {"done"}
    assert ledger(store.storage)["claims"].keys() == {"other"}


def test_a_run_that_is_alone_waits_for_nothing(store):
    _, events = drive(store, Clock(), lambda: None)
    assert [e.kind for e in events] == ["start", "start", "commit", "commit", "finished"]
    assert ledger(store.storage)["claims"] == {}


def test_a_run_that_is_interrupted_leaves_nothing(store):
    def passed():
        raise KeyboardInterrupt

    assert drive(store, Clock(), passed)[0] == "interrupted"
    assert ledger(store.storage)["claims"] == {}


@pytest.mark.ray
@pytest.mark.slow
def test_two_pipelines_that_want_the_gpu_of_a_cluster_get_as_much_of_it(four_nodes, tmp_path):
    words = [sys.executable, "-m", "tests.pipelines.competing", four_nodes.address, str(tmp_path / "store")]
    told = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, timeout=600).stdout)
    assert told["said"] == ["done", "done"]
    for number, _ in enumerate(told["order"], 1):
        so_far = told["order"][:number]
        assert abs(so_far.count("a") - so_far.count("b")) <= 1, told["order"]
    (left,) = (tmp_path / "store" / "ledgers").iterdir()
    assert json.loads(left.read_text())["claims"] == {}
