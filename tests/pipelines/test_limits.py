"""What a run has spent, and when it has to end: by hand."""

import math

import pytest

from cluster.profile import Group, Head, Profile
from pipelines.limits import Limits, Spent, passed, senseless, spent, unpriced
from pipelines.lineage import Event
from pipelines.steps import StepSpec

PROFILE = Profile(
    name="priced",
    place="kuberay",
    head=Head(cpus=4, memory_gib=16, price_per_hour=0.5),
    groups={
        "cpu": Group(cpus=8, memory_gib=32, max_nodes=4, price_per_hour=1.0),
        "gpu": Group(cpus=8, memory_gib=32, gpus=1, accelerator="L4", max_nodes=4, price_per_hour=4.0),
    },
    currency="EUR",
)
HOUR = 3600.0


def nodes(hours, **counts):
    return Event("nodes", data={"nodes": counts}, time=hours * HOUR)


def at(hours, kind, **data):
    return Event(kind, data=data, time=hours * HOUR)


@pytest.mark.parametrize(
    ("events", "now", "hours", "cost"),
    [
        ([], 0, 0, 0),
        ([at(0, "started")], 0, 0, 0),
        ([at(0, "started")], 2, 2, 1.0),  # the head alone
        ([at(0, "started"), at(2, "finished")], 0, 2, 1.0),
        ([at(0, "started"), nodes(1, gpu=2)], 2, 2, 1.0 + 8.0),
        ([at(0, "started"), nodes(1, gpu=2), nodes(1.5, gpu=1, cpu=3), at(2, "finished")], 0, 2, 1.0 + 4.0 + 3.5),
        # Between two drivers nobody worked; a group that the profile does not have costs nothing that it knows.
        ([at(0, "started"), nodes(0, cpu=1, other=9), at(1, "commit"), at(5, "started"), at(6, "finished")], 0, 2, 2.0),
        # A driver that did not write down its end counts up to what was heard of it last.
        ([at(0, "started"), nodes(0, gpu=1), at(1, "commit")], 0, 1, 4.5),
    ],
)
def test_what_was_spent_is_read_from_a_journal(events, now, hours, cost):
    found = spent(events, PROFILE, now * HOUR)
    assert (found.seconds, found.cost) == pytest.approx((hours * HOUR, cost))
    assert spent(events, None, now * HOUR) == Spent(seconds=found.seconds)


def test_what_was_spent_while_one_step_ran_is_told_from_the_rest():
    def of(step, hours, kind):
        return Event(kind, step, {}, hours * HOUR)

    events = [
        at(0, "started"),
        nodes(0, cpu=1),
        of("found", 1, "start"),
        nodes(2, cpu=3),
        of("other", 2.5, "start"),
        of("found", 3, "fail"),
        at(4, "finished"),
        at(7, "started"),  # of the machines it is heard anew
        of("found", 8, "start"),
        nodes(8, gpu=1),
    ]
    assert spent(events[:3], PROFILE, 2 * HOUR, step="found").cost == pytest.approx(1.5)
    assert spent(events, PROFILE, 9 * HOUR, step="found").cost == pytest.approx(1.5 + 3.5 + 4.5)
    assert spent(events, PROFILE, 9 * HOUR, step="nothing") == Spent()


@pytest.mark.parametrize(
    ("limits", "so_far", "ahead_s", "counts", "said"),
    [
        (Limits(), Spent(seconds=1e9, cost=1e9), 60, {"gpu": 4}, ""),
        (Limits(deadline_s=HOUR), Spent(seconds=HOUR - 10), 10, {}, ""),
        (Limits(deadline_s=HOUR), Spent(seconds=HOUR - 10), 11, {}, "worked for 1.00 h, and would pass its deadline"),
        (Limits(max_cost=10), Spent(cost=9.0), HOUR, {"cpu": 0.5}, ""),
        (Limits(max_cost=10), Spent(cost=9.0), HOUR, {"cpu": 1}, "has cost 9.00 EUR, and would pass its --max-cost"),
        (Limits(max_cost=10), Spent(cost=9.99), 0, {"gpu": 4}, ""),
    ],
)
def test_a_run_ends_before_it_passes_a_limit(limits, so_far, ahead_s, counts, said):
    why = passed(limits, so_far, ahead_s, counts, PROFILE)
    assert (said in why) if said else why == ""


def test_without_a_limit_there_is_nothing_to_look_at():
    assert not Limits().any
    assert Limits(max_cost=1).any
    assert Limits(deadline_s=1).any
    assert Limits(deadline_s=math.inf) == Limits()


def test_a_limit_that_is_passed_at_once_or_never_is_refused():
    assert not list(senseless(Limits(deadline_s=91, max_cost=1), PROFILE))
    (said,) = senseless(Limits(deadline_s=90), PROFILE)
    assert str(said).startswith("--deadline: 90 s, expected more than the profile's drain_s of 90 s")
    free = Profile(name="free", place="local", head=Head(cpus=1, memory_gib=1))
    assert not list(senseless(Limits(), free))
    (said,) = senseless(Limits(max_cost=1), free)
    assert str(said) == "--max-cost: no machine has a price, expected price_per_hour in the profile."


def test_a_search_that_is_to_cost_no_more_needs_prices():
    free = Profile(name="free", place="local", head=Head(cpus=1, memory_gib=1))
    steps = {
        n: StepSpec(operator="search", inputs={}, params={"max_cost": cost}) for n, cost in (("a", 5.0), ("b", 0.0))
    }
    assert not list(unpriced(steps, PROFILE))
    (said,) = unpriced(steps, None)
    assert str(said) == "step 'a': max_cost: no profile, expected one with prices. Name it with --cluster."
    (said,) = unpriced(steps, free)
    assert said.sentence == "max_cost: no machine has a price, expected price_per_hour in the profile."
