"""One computes, the others wait: who holds a lease, and when another one gets it."""

import errno
import json
import os

import pytest

from cluster import processes
from pipelines import leases as module
from pipelines.leases import BEAT_S, LEASE_S, Leases
from pipelines.storage.base import StorageFailed
from pipelines.store import canonical
from tests.pipelines.failing import FailingStorage

DEAD = {"host": processes.host(), "pid": os.getpid(), "born": 1.0, "run": "dead", "step": "a", "beat": 0}
AWAY = {**DEAD, "host": "elsewhere", "run": "away"}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def storage(either_store):
    return either_store.storage


def test_one_holds_it_until_it_is_given_back(storage, clock):
    one, two = Leases(storage, "one", clock), Leases(storage, "two", clock)
    assert one.take("f", "a") == ""
    assert one.take("f", "a") == "", "it is ours already"
    assert two.take("f", "a") == "one"
    two.give_back("f", "a")
    assert two.take("f", "a") == "one", "it was not theirs to give back"
    one.give_back("f", "a")
    assert two.take("f", "a") == ""


def test_a_second_step_of_a_run_waits_for_the_first(storage, clock):
    one = Leases(storage, "one", clock)
    assert one.take("f", "a") == ""
    assert one.take("f", "b") == "one"
    one.give_back("f", "b")
    assert one.holds("f", "a")


def test_the_lease_of_a_process_that_is_dead_is_taken_over_at_once(storage, clock):
    storage.put_if_absent("leases/f.json", canonical(DEAD))
    assert Leases(storage, "one", clock).take("f", "a") == ""


def test_the_lease_of_another_machine_is_taken_over_when_it_has_been_silent(storage, clock):
    storage.put_if_absent("leases/f.json", canonical(AWAY))
    one = Leases(storage, "one", clock)
    assert one.take("f", "a") == "away"
    clock.now = LEASE_S
    assert one.take("f", "a") == "away"
    beaten = canonical({**AWAY, "beat": 1})
    assert storage.replace_if_match("leases/f.json", beaten, canonical(AWAY))
    clock.now = LEASE_S + 1
    assert one.take("f", "a") == "away", "it has said something since"
    clock.now = 2 * LEASE_S + 2
    assert one.take("f", "a") == ""


def test_of_two_that_find_it_silent_one_takes_it(storage, clock):
    storage.put_if_absent("leases/f.json", canonical(AWAY))
    found = [Leases(storage, name, clock) for name in ("one", "two")]
    for leases in found:
        assert leases.take("f", "a") == "away"
    clock.now = LEASE_S + 1
    assert [leases.take("f", "a") for leases in found] == ["", "one"]


def test_a_holder_that_beats_keeps_it(storage, clock, monkeypatch):
    one, two = Leases(storage, "one", clock), Leases(storage, "two", clock)
    monkeypatch.setattr(module.processes, "alive", lambda claim: None)  # as on two machines
    one.take("f", "a")
    for _ in range(10):
        clock.now += BEAT_S + 1
        one.beat()
        assert two.take("f", "a") == "one"


def test_a_holder_that_was_taken_for_dead_hears_of_it_and_leaves_the_other_one_s_alone(storage, clock, monkeypatch):
    one, two = Leases(storage, "one", clock), Leases(storage, "two", clock)
    monkeypatch.setattr(module.processes, "alive", lambda claim: None)
    one.take("f", "a")
    assert two.take("f", "a") == "one"
    clock.now = LEASE_S + 1
    assert two.take("f", "a") == ""
    one.beat()
    assert not one.holds("f", "a")
    one.give_all_back()
    assert two.holds("f", "a")
    assert Leases(storage, "three", clock).take("f", "a") == "two"


def test_a_beat_that_storage_refuses_costs_no_lease_and_is_said_again(store, clock):
    refusing = FailingStorage(store.storage, ("replace_if_match",), number=1, error=errno.ENOSPC)
    one = Leases(refusing, "one", clock)
    for name in "fg":
        one.take(name, "a")
    clock.now = BEAT_S + 1
    with pytest.raises(StorageFailed):
        one.beat()
    clock.now = 2 * BEAT_S + 2
    one.beat()
    said = [json.loads(store.storage.read(f"leases/{name}.json"))["beat"] for name in "fg"]
    assert (said, one.holds("f", "a"), one.holds("g", "a")) == ([2, 2], True, True)
