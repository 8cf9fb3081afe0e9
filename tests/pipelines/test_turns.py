"""Whose turn it is among the runs of one cluster: tables, and properties of simulated runs with a made-up clock."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from cluster.capacity import Capacity, Node
from operators.resources import Resources
from pipelines.rooms import rooms, taken
from pipelines.turns import Claim, Gang, Ledger, ahead, entered, turn, without
from tests.pipelines.crowds import Crowd, Crowded, Job

SIMULATED = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
TWO = Capacity.of([Node(cpus=8, gpus=4)] * 2)


def gpus(each=1, workers=1):
    strategy = "ddp" if workers > 1 else "single"
    return Resources(workers=workers, strategy=strategy, gpus_per_worker=each, accelerator="gpu")


def cpus(each=1):
    return Resources(cpus_per_worker=each)


def enter(ledger, run, *wants, holds=(), priority=0, account="", **since):
    """The ledger with what a run wants, and holds by name."""
    gangs = [Gang(step=f"{run}{i}", asks=asks) for i, asks in enumerate(wants)]
    held = [Gang(step=f"held{i}", asks=asks, number=0) for i, asks in enumerate(holds)]
    claim = Claim(account=account or run, priority=priority, wants=tuple(gangs), holds=tuple(held))
    return entered(ledger, run, claim, since)


def crowd(there, *entries, ledger=None):
    """The steps of each run that start when all have entered what they want, in that order."""
    ledger = ledger or Ledger()
    for run, wants, options in entries:
        ledger = enter(ledger, run, *wants, **options)
    for run, _, _ in entries:
        ledger = turn(ledger, run, there)
    return {r: [g.step for g in c.holds if not g.step.startswith("held")] for r, c in ledger.claims.items()}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        pytest.param(
            [("a", [gpus()] * 6, {}), ("b", [gpus()] * 6, {})],
            {"a": ["a0", "a1", "a2", "a3"], "b": ["b0", "b1", "b2", "b3"]},
            id="who comes at the same time shares at once",
        ),
        pytest.param(
            [("a", [gpus()] * 8, {"gpu": 9.0}), ("b", [gpus()] * 6, {})],
            {"a": ["a0", "a1", "a2", "a3"], "b": ["b0", "b1", "b2", "b3"]},
            id="what was served before others came is no debt",
        ),
        pytest.param(
            [("a", [gpus()] * 6, {}), ("b", [gpus()] * 6, {"priority": 1})],
            {"a": ["a0", "a1"], "b": ["b0", "b1", "b2", "b3", "b4", "b5"]},
            id="the higher priority comes first",
        ),
        pytest.param(
            [("a", [gpus()], {"holds": [gpus()] * 3}), ("b", [gpus(workers=6)], {})],
            {"a": [], "b": []},
            id="a gang of which not all find room starts not at all, and keeps what there is",
        ),
        pytest.param(
            [("b", [gpus(workers=6)], {"holds": [gpus()] * 3}), ("a", [gpus()], {})],
            {"a": ["a0"], "b": []},
            id="whoever waits for its own steps lets others have what it has not waited for longest",
        ),
        pytest.param(
            [("c", [], {"holds": [gpus()] * 5}), ("b", [gpus(4)], {}), ("a", [gpus()], {})],
            {"a": [], "b": [], "c": []},
            id="a machine on which the first in line waits for the rest is kept for it",
        ),
        pytest.param(
            [("c", [], {"holds": [gpus(4), gpus()]}), ("b", [gpus(4)], {}), ("a", [cpus(), gpus()], {})],
            {"a": ["a0"], "b": [], "c": []},
            id="what needs none of that goes on",
        ),
        pytest.param(
            [("c", [], {"holds": [gpus(3), gpus(3)]}), ("b", [gpus(2)], {})],
            {"c": [], "b": []},
            id="each worker needs its GPUs on one machine",
        ),
        pytest.param(
            [("b", [gpus(9)], {}), ("a", [gpus()], {})], {"a": ["a0"], "b": []}, id="what can never start keeps nobody"
        ),
        pytest.param(
            [("a~s~1", [gpus()] * 8, {"account": "a"}), ("a~s~2", [gpus()] * 8, {"account": "a"}), ("b", [gpus()], {})],
            {"a~s~1": [f"a~s~1{i}" for i in range(7)], "a~s~2": [], "b": ["b0"]},
            id="trials of one search are one run to others",
        ),
    ],
)
def test_turns(entries, expected):
    assert crowd(TWO, *entries) == expected


def test_a_run_that_has_had_more_waits_until_others_have_had_as_much():
    ledger = enter(enter(Ledger(), "a", gpus(4, 2), gpu=0.0), "b", gpus(4, 2))
    ledger = turn(ledger, "a", TWO)
    ledger = enter(ledger, "a", gpus(4, 2), gpu=80.0)  # its first step has ended
    assert ahead(ledger, "a") == {"a0": ("b",)}
    assert turn(ledger, "a", TWO).claims["a"].holds == ()
    assert len(turn(ledger, "b", TWO).claims["b"].holds) == 1


def test_what_has_had_its_turn_and_finds_no_machine_keeps_others_from_those_that_could_hold_it():
    there = Capacity.of([Node(cpus=8, gpus=4)] * 2 + [Node(cpus=8, gpus=1)])
    ledger = enter(enter(Ledger(), "a", holds=[gpus()] * 4), "b", gpus(4))
    ledger = turn(ledger, "b", there)
    assert [g.placed for g in ledger.claims["b"].holds] == [False]
    ledger = turn(enter(ledger, "a", gpus(), gpus()), "a", there)
    assert len(ledger.claims["a"].holds) == 1, "on the machine that is too small for the other"
    found = replace(ledger.claims["b"], holds=(replace(ledger.claims["b"].holds[0], placed=True),))
    ledger = turn(entered(ledger, "b", found, {}), "a", there)
    assert len(ledger.claims["a"].holds) == 2


def test_time_without_wants_is_no_credit():
    ledger = enter(enter(Ledger(), "a", gpus()), "b", gpus())
    ledger = enter(ledger, "b")  # wants nothing for a while
    for _ in range(10):
        ledger = enter(ledger, "a", gpus(), gpu=100.0)
    ledger = enter(ledger, "b", gpus())
    assert ledger.served == {"a": {"gpu": 1000.0, "cpu": 0.0}, "b": {"gpu": 1000.0, "cpu": 0.0}}


def test_nor_is_a_pause_of_all_others():
    ledger = enter(Ledger(), "a", gpus())
    ledger = enter(ledger, "a", gpus(), gpu=1000.0)
    ledger = enter(enter(ledger, "a", cpus()), "b", gpus())  # a computes something without GPUs
    ledger = enter(ledger, "a", gpus())
    assert ledger.served["b"]["gpu"] == ledger.served["a"]["gpu"] == 1000.0


def test_who_has_gone_leaves_nothing_but_how_far_all_had_been_served():
    ledger = enter(Ledger(), "a", gpus(), gpu=50.0)
    ledger = enter(ledger, "a", gpus(), gpu=50.0)
    gone = without(ledger, {"a"})
    assert (gone.claims, gone.served, gone.floors) == ({}, {}, {0: {"gpu": 100.0, "cpu": 0.0}})


def test_what_a_trial_had_is_its_search_s_when_it_has_ended():
    ledger = enter(enter(Ledger(), "s"), "s~f~1", gpus(), account="s")
    ledger = without(enter(ledger, "s~f~1", account="s", gpu=70.0), {"s~f~1"})
    assert ledger.served["s"]["gpu"] == 70.0


SHAPES = st.sampled_from([gpus(), gpus(2), gpus(4), gpus(1, 2), gpus(1, 4), gpus(2, 2), gpus(4, 2), gpus(1, 8)])
MIXED = st.one_of(SHAPES, st.sampled_from([cpus(), cpus(4), Resources(workers=4, strategy="ddp")]))
SECONDS = st.floats(1, 100)
JOBS = st.lists(st.builds(Job, MIXED, SECONDS), min_size=1, max_size=12)
MACHINES = st.sampled_from(
    [TWO, Capacity.of([Node(cpus=16, gpus=8)]), Capacity.of([Node(cpus=4, gpus=4)] * 2 + [Node(cpus=8)])]
)
RUNS = st.lists(st.builds(Crowded, JOBS, began=st.floats(0, 200), priority=st.integers(0, 1)), min_size=2, max_size=4)


def room_left(ledger, there):
    """Whether all that is held has places."""
    free = taken([g.asks for c in ledger.claims.values() for g in c.holds], rooms(there))
    return all(min(r.free.cpus, r.free.gpus) >= 0 for r in free)


@SIMULATED
@given(RUNS, MACHINES)
def test_gangs_start_whole_beside_what_others_hold_and_all_come_to_an_end(runs, there):
    assume(all(j.asks.gpus <= 8 and j.asks.cpus <= there.cpus for r in runs for j in r.jobs))

    def check(before, after, run):
        was, now = before.claims[run], after.claims[run]
        assert {g.step: g.asks for g in (*was.wants, *was.holds)} == {g.step: g.asks for g in (*now.wants, *now.holds)}
        assert {g.step for g in now.wants}.isdisjoint(g.step for g in now.holds)
        alone = not any(c.wants or c.holds for n, c in before.claims.items() if n != run)
        assert alone or now == was or room_left(after, there) or not room_left(before, there)

    simulated = Crowd(there, {f"r{i}": r for i, r in enumerate(runs)}, check)
    simulated.drive()
    assert all(r.over for r in runs)
    assert without(simulated.ledger, {f"r{i}" for i in range(len(runs))}).claims == {}


@SIMULATED
@given(st.lists(st.tuples(SHAPES, st.floats(20, 60)), min_size=2, max_size=2), st.floats(0, 100))
def test_of_two_that_want_all_gpus_none_gets_less_than_four_tenths_of_their_time(shapes, late):
    runs = [Crowded([Job(*shape)] * 3000, began=i * late) for i, shape in enumerate(shapes)]
    Crowd(TWO, dict(zip("ab", runs, strict=True))).drive(until=late + 20 * max(seconds for _, seconds in shapes))
    assert min(r.spent for r in runs) >= 0.4 * sum(r.spent for r in runs)


@SIMULATED
@given(st.lists(SECONDS, min_size=40, max_size=40), st.sampled_from([gpus(4, 2), gpus(1, 8), gpus(2, 4)]), SECONDS)
def test_a_large_gang_waits_for_what_runs_and_for_nothing_that_is_small_and_comes_later(seconds, asks, late):
    small = Crowded([Job(gpus(), s) for s in seconds])
    large = Crowded([Job(asks, 10)], began=late)
    Crowd(TWO, {"small": small, "large": large}).drive()
    assert large.waited[0] <= max(seconds)


@SIMULATED
@given(JOBS, MACHINES)
def test_a_run_that_is_alone_never_waits(jobs, there):
    assume(all(j.asks.gpus <= there.gpus and j.asks.cpus <= there.cpus for j in jobs))
    run = Crowded(jobs)
    Crowd(there, {"alone": run}).drive()
    assert run.over
    assert set(run.waited.values()) == {0.0}


@SIMULATED
@given(st.lists(SECONDS, min_size=3, max_size=8), st.floats(0, 50))
def test_nothing_of_a_lower_priority_starts_while_a_higher_one_waits_for_it(seconds, late):
    low, high = Crowded([Job(gpus(), s) for s in seconds]), Crowded([Job(gpus(), 20)] * 3, began=late, priority=1)
    simulated = Crowd(Capacity(cpus=1, gpus=1), {"low": low, "high": high})
    simulated.drive()
    when = [name for name, _ in simulated.order]
    assert "low" not in when[when.index("high") : when.index("high") + 3]
