"""What a run really took, from its journal alone: by hand, and whatever happened it adds up."""

import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings, strategies as st

from cluster.profile import Group, Head, Profile
from operators.resources import Resources
from pipelines.costs import rows
from pipelines.limits import spent
from pipelines.lineage import Event
from pipelines.spec import RESOURCES
from pipelines.usage import foreseen, usage
from tests.pipelines.test_limits import HOUR, PROFILE as PRICED

PROFILE = replace(PRICED, groups={**PRICED.groups, "gpu": replace(PRICED.groups["gpu"], gpus=4)})
GPU = {"gpus_per_worker": 1, "accelerator": "gpu"}


def started(hours, asked=None, profile=PROFILE, run="r", **others):
    steps = {n: {"operator": "tune", "resources": RESOURCES.dump_python(a)} for n, a in (asked or {}).items()}
    steps |= {
        n: {"operator": "search", "resources": RESOURCES.dump_python(Resources())} for n in others.pop("search", ())
    }
    told = {} if profile is None else {"profile": asdict(profile)}
    return Event("started", data={"run": run, "steps": steps, **told, **others}, time=hours * HOUR)


def nodes(hours, **counts):
    return Event("nodes", data={"nodes": counts}, time=hours * HOUR)


def at(hours, kind, step="", **data):
    return Event(kind, step, data, hours * HOUR)


def hours(found):
    return {step: {g: round(h, 9) for g, h in line.hours.items()} for step, line in found.steps.items()}


def idle(found):
    return {g: round(h, 9) for g, h in found.idle.hours.items() if h}


@pytest.mark.parametrize(
    ("asked", "events", "steps", "unused"),
    [
        # A machine that one step is on is the step's, however little it holds of it; the other one is idle.
        ({"a": Resources()}, [nodes(0, cpu=2), at(0, "start", "a"), at(1, "commit", "a"), at(2, "finished")],
         {"a": {"cpu": 1}}, {"cpu": 3}),
        # Two that fit on one share it as they hold it.
        ({"a": Resources(), "b": Resources(cpus_per_worker=3)},
         [nodes(0, cpu=2), at(0, "start", "a"), at(0, "start", "b"), at(1, "commit", "a"), at(2, "commit", "b")],
         {"a": {"cpu": 0.25}, "b": {"cpu": 1.75}}, {"cpu": 2}),
        # By what a worker asks most of: half of the memory is half of a machine.
        ({"a": Resources(memory=16 << 30), "b": Resources(cpus_per_worker=4)},
         [nodes(0, cpu=1), at(0, "start", "a"), at(0, "start", "b"), at(1, "commit", "a"), at(1, "commit", "b")],
         {"a": {"cpu": 0.5}, "b": {"cpu": 0.5}}, {}),
        # Workers that do not fit on one machine are on several, though they would not fill them.
        ({"a": Resources(workers=2, cpus_per_worker=5)},
         [nodes(0, cpu=3), at(0, "start", "a"), at(1, "commit", "a")], {"a": {"cpu": 2}}, {"cpu": 1}),
        # Without GPUs on machines without; with some on those that have some.
        ({"a": Resources(), "b": Resources(**GPU)},
         [nodes(0, cpu=1, gpu=1), at(0, "start", "a"), at(0, "start", "b"), at(1, "commit", "a"), at(2, "commit", "b")],
         {"a": {"cpu": 1}, "b": {"gpu": 2}}, {"cpu": 1}),
        # Where it was noted, there.
        ({"a": Resources()}, [nodes(0, cpu=1, gpu=1), at(0, "start", "a"), at(1, "commit", "a", group="gpu")],
         {"a": {"gpu": 1}}, {"cpu": 1}),
        # On the head it takes nothing that is not the head's.
        ({"a": Resources()}, [nodes(0, cpu=1), at(0, "start", "a"), at(1, "commit", "a", group="head")],
         {}, {"cpu": 1}),
        # Before it has its place it holds nothing: it says how long it worked.
        ({"a": Resources()}, [nodes(0, cpu=1), at(0, "start", "a"), at(2, "commit", "a", seconds=0.5 * HOUR)],
         {"a": {"cpu": 0.5}}, {"cpu": 1.5}),
        # The machine comes later than the step is handed over, and goes before its driver hears that.
        ({"a": Resources()},
         [at(0, "start", "a"), nodes(1, cpu=1), nodes(2), at(3, "fail", "a", log="x"), at(3, "finished")],
         {"a": {"cpu": 1}}, {}),
        # More is held than is counted: it is divided.
        ({"a": Resources(cpus_per_worker=8), "b": Resources(cpus_per_worker=8)},
         [nodes(0, cpu=1), at(0, "start", "a"), at(0, "start", "b"), at(1, "commit", "a"), at(1, "commit", "b")],
         {"a": {"cpu": 0.5}, "b": {"cpu": 0.5}}, {}),
        # An attempt that asks for more memory after it ran out holds more.
        ({"a": Resources(memory=8 << 30), "b": Resources(cpus_per_worker=4)},
         [nodes(0, cpu=1), at(0, "start", "a", eased={"memory": 16 << 30}), at(0, "start", "b"), at(1, "commit", "a"),
          at(1, "commit", "b")], {"a": {"cpu": 0.5}, "b": {"cpu": 0.5}}, {}),
        # One that never got a place, and one whose driver died.
        ({"a": Resources(), "b": Resources()},
         [nodes(0, cpu=1), at(0, "fail", "b", log=""), at(0, "start", "a"), at(1, "heard"),
          started(5, {"a": Resources()}), nodes(5, cpu=1), at(6, "finished")], {"a": {"cpu": 1}}, {"cpu": 1}),
    ],
)  # fmt: skip
def test_machines_belong_to_the_steps_that_were_on_them(asked, events, steps, unused):
    found = usage([started(0, asked), *events])
    assert (hours(found), idle(found)) == (steps, unused)
    assert found.whole.cost == pytest.approx(spent([started(0, asked), *events], PROFILE).cost)


def test_a_run_that_goes_on_is_told_until_now():
    events = [started(0, {"a": Resources()}), nodes(0, cpu=1), at(0, "start", "a"), at(1, "heard")]
    found = usage(events, now=2 * HOUR)
    assert (hours(found), found.head.total, found.whole.cost) == ({"a": {"cpu": 2.0}}, 2.0, 3.0)


def test_what_trials_held_the_search_above_them_has_taken():
    parent = [started(0, search=["found"]), nodes(0, cpu=2), at(0, "start", "found"), at(3, "commit", "found")]
    wide = {"part": Resources(cpus_per_worker=8)}
    one = [started(0, wide, None), at(0, "start", "part"), at(1, "commit", "part"), at(1, "finished")]
    other = [started(0.5, wide, None), at(0.5, "start", "part"), at(1, "heard")]  # went with the run that began it
    found = usage(parent, {"r~found~1": one, "r~found~2": other, "r~found~2~inner~3": one})
    assert (hours(found), idle(found)) == ({"found": {"cpu": 4.0}}, {"cpu": 2.0})


def test_without_a_profile_or_prices_nothing_is_said_of_costs():
    events = [nodes(0, cpu=1), at(0, "start", "a"), at(1, "commit", "a")]
    assert usage([started(0, {"a": Resources()}, None), *events]) is None
    free = Profile(name="free", place="kuberay", head=Head(cpus=4, memory_gib=16),
                   groups={"cpu": Group(cpus=8, memory_gib=32)})  # fmt: skip
    found = usage([started(0, {"a": Resources()}, free), *events])
    assert (hours(found), found.whole.cost, found.steps["a"].cost) == ({"a": {"cpu": 1.0}}, None, None)
    (row, *_) = rows(["a"], found, {})
    assert row.cells == ("cpu", "1.00", "")


def test_only_drivers_with_prices_in_one_currency_are_added_up():
    dollars = Profile(name="other", place="kuberay", head=Head(cpus=4, memory_gib=16, price_per_hour=9.0))
    events = [started(0, profile=dollars), at(1, "finished"), started(2, profile=None), at(3, "finished"),
              started(4), at(6, "finished")]  # fmt: skip
    found = usage(events)
    assert (found.currency, found.whole.cost, found.head.total) == ("EUR", 1.0, 2.0)


def test_a_step_is_beside_what_the_plan_foresaw_when_it_was_to_run():
    said = {"group": "cpu", "nodes": 2, "seconds": [1800, 3600], "cost": [1.0, 2.0]}
    stored = {"group": "", "nodes": 0, "seconds": None, "cost": None}
    total = {"seconds": [3600, 7200], "steps": [1.0, 2.0], "head": [0.5, 1.0], "idle": [0.0, 0.1], "cost": [1.5, 3.1]}
    first = started(
        0, {"a": Resources(), "b": Resources()}, estimate={"steps": {"a": said, "b": stored}, "total": total}
    )
    later = started(5, {"a": Resources(), "b": Resources()},
                    estimate={"steps": {"a": stored, "b": said}, "total": {}})  # fmt: skip
    events = [
        first,
        nodes(0, cpu=1),
        at(0, "start", "a"),
        at(1, "commit", "a"),
        at(1, "finished"),
        later,
        at(5, "finished"),
    ]
    plan = foreseen(events)
    assert (plan["steps"], plan["total"]) == ({"a": said, "b": said}, total)
    assert [(r.what, *r.cells) for r in rows(["a", "b"], usage(events), plan)] == [
        ("a", "cpu", "1.00", "1.00 to 2.00", "1.00", "1.00 to 2.00"),
        ("b", "", "0.00", "1.00 to 2.00", "0.00", "1.00 to 2.00"),
        ("idle", "", "0.00", "", "0.00", "0.00 to 0.10"),
        ("head", "", "1.00", "1.00 to 2.00", "0.50", "0.50 to 1.00"),
        ("all", "", "2.00", "", "1.50", "1.50 to 3.10"),
    ]
    assert foreseen([started(0)]) == {}


ASKS = st.builds(
    lambda workers, cpus, gpus, memory: Resources(workers=workers, cpus_per_worker=cpus, memory=memory << 28,
                                                  **({**GPU, "gpus_per_worker": gpus} if gpus else {})),
    st.integers(1, 6), st.sampled_from([0.1, 1, 3, 8]), st.sampled_from([0, 0, 0.5, 1, 4]), st.integers(0, 140),
)  # fmt: skip


@st.composite
def journals(draw):
    """What drivers could write, and a time at which somebody looks."""
    asked = draw(st.dictionaries(st.sampled_from("abcdef"), ASKS, min_size=1))
    events, moment = [], 0.0
    for _ in range(draw(st.integers(1, 2))):
        events.append(started(moment, asked))
        for _ in range(draw(st.integers(0, 12))):
            moment += draw(st.floats(0, 2))
            step, group = (
                draw(st.sampled_from(sorted(asked))),
                draw(st.sampled_from(["", "", "cpu", "gpu", "head", "gone"])),
            )
            kind = draw(st.sampled_from(["nodes", "start", "commit", "fail"]))
            if kind == "nodes":
                names = st.sampled_from(["cpu", "gpu", "gone"])
                events.append(at(moment, "nodes", nodes=draw(st.dictionaries(names, st.integers(1, 5)))))
            else:
                noted = {"group": group} if group else {}
                seconds = draw(st.sampled_from([{}, {"seconds": 600.0}, {"seconds": 1e6}]))
                events.append(at(moment, kind, step, **(noted | seconds if kind != "start" else {})))
        moment += 1
    return events, draw(st.sampled_from([0.0, moment * HOUR]))


@settings(max_examples=150, deadline=None)
@given(journals())
def test_all_lines_together_are_every_machine_that_was_there(journal):
    events, now = journal
    found = usage(events, now=now)
    whole = spent(events, PROFILE, now)
    assert found.whole.cost == pytest.approx(whole.cost)
    assert found.head.total == pytest.approx(whole.seconds / HOUR)
    lines = [*found.steps.values(), found.idle, found.head]
    assert all(h >= 0 for line in lines for h in line.hours.values())
    assert math.fsum(line.cost for line in lines) == pytest.approx(whole.cost)
    each = {g: math.fsum(line.hours.get(g, 0) for line in lines) for g in found.whole.hours}
    assert each == pytest.approx(found.whole.hours)
