"""Decisions as tables: no Ray, no clock, no files."""

from dataclasses import replace

import pytest

from cluster.capacity import Capacity, Node
from operators.resources import Resources
from pipelines.failures import Failure
from pipelines.plan import Plan, PlannedStep
from pipelines.schedule import Finish, Progress, Refuse, Reuse, Start, Wait, absent, decide, eased, infeasible
from pipelines.spec import Spec

USER, MEMORY = Failure.USER, Failure.MEMORY


def planned(**needs):
    steps = {}
    for name, (before, gpus) in needs.items():
        resources = Resources(gpus_per_worker=gpus, accelerator="gpu") if gpus else Resources()
        steps[name] = PlannedStep(
            name=name,
            operator="noop",
            inputs={},
            method=None,
            params={},
            resources=resources,
            kind="dataset",
            effect=name == "endpoint",
            starts_workers=False,
            trains=False,
            needs=tuple(before),
            fingerprint=f"f-{name}",
            components={},
        )
    return Plan(spec=Spec(name="p", inputs={}, steps={}), inputs={}, steps=steps)


TWO_EXPERTS = planned(student=("", 0), one=(["student"], 1), two=(["student"], 1), endpoint=(["one", "two"], 0))
ALL = Capacity(cpus=8, gpus=8)


@pytest.mark.parametrize(
    ("progress", "capacity", "expected"),
    [
        pytest.param(Progress(), ALL, (Start("student"),), id="only what needs nothing starts"),
        pytest.param(Progress(), None, (Start("student"),), id="without a cluster everything ready starts"),
        pytest.param(
            Progress(done=frozenset({"student"})), ALL, (Start("one"), Start("two")), id="independent start together"
        ),
        pytest.param(
            Progress(done=frozenset({"student"})),
            Capacity(cpus=8, gpus=1),
            (Start("one"),),
            id="the second expert waits when GPUs run out",
        ),
        pytest.param(
            Progress(done=frozenset({"student"}), running=frozenset({"one"})),
            Capacity(cpus=8, gpus=1),
            (),
            id="what runs holds its GPU",
        ),
        pytest.param(
            Progress(stored=frozenset({"f-student", "f-one", "f-two"})),
            Capacity(cpus=8, gpus=0),
            (Reuse("student"), Reuse("one"), Reuse("two"), Start("endpoint")),
            id="a stored chain is reused at once, without asking for GPUs",
        ),
        pytest.param(
            Progress(done=frozenset({"student", "one", "two"}), stored=frozenset({"f-endpoint"})),
            ALL,
            (Start("endpoint"),),
            id="an effect is done again although it is stored",
        ),
        pytest.param(
            Progress(stored=frozenset({"f-student"}), forced=frozenset({"student"})),
            ALL,
            (Start("student"),),
            id="a forced step runs although it is stored",
        ),
        pytest.param(
            Progress(done=frozenset({"student", "two"}), failures={"one": {USER: 1}}),
            ALL,
            (Finish(failed=("one",), skipped=("endpoint",)),),
            id="what needs a failed step never starts",
        ),
        pytest.param(
            Progress(done=frozenset({"student"}), elsewhere=frozenset({"one"})),
            Capacity(cpus=8, gpus=1),
            (Start("two"),),
            id="what another run computes holds nothing of this one's",
        ),
        pytest.param(
            Progress(done=frozenset({"student", "two"}), elsewhere=frozenset({"one"})),
            ALL,
            (),
            id="what another run computes is waited for",
        ),
        pytest.param(
            Progress(done=frozenset({"student", "two"}), stored=frozenset({"f-one"})),
            ALL,
            (Reuse("one"), Start("endpoint")),
            id="and reused when it is there",
        ),
        pytest.param(
            Progress(done=frozenset({"student", "one", "two", "endpoint"})),
            ALL,
            (Finish(failed=(), skipped=()),),
            id="all done",
        ),
    ],
)
def test_decide(progress, capacity, expected):
    assert decide(TWO_EXPERTS, progress, capacity) == expected


BUDGETS = {
    Failure.USER: 0,
    Failure.MEMORY: 1,
    Failure.PREEMPTION: 3,
    Failure.NODE: 2,
    Failure.STORAGE: 2,
    Failure.TIMEOUT: 1,
    Failure.OTHER: 1,
}
TRAINS = {"trains": True, "params": {"batch_size": 9, "micro_batch_size": None}}
GIVEN_UP = "given up"


@pytest.mark.parametrize(
    ("asks", "changes", "failed", "expected"),
    [
        ({}, {}, {USER: 1}, GIVEN_UP),
        ({}, {}, {Failure.OTHER: 1}, Start("a")),
        ({}, {}, {Failure.OTHER: 2}, GIVEN_UP),
        ({}, {}, {Failure.TIMEOUT: 1}, Start("a")),
        ({}, {}, {Failure.TIMEOUT: 1, Failure.OTHER: 1, Failure.PREEMPTION: 3}, Start("a")),
        ({}, {}, {Failure.TIMEOUT: 1, Failure.OTHER: 1, Failure.PREEMPTION: 4}, GIVEN_UP),
        ({}, {}, {Failure.STORAGE: 1}, Start("a", delay=2.0)),
        ({}, {}, {Failure.STORAGE: 2}, Start("a", delay=8.0)),
        ({}, {}, {Failure.STORAGE: 1, Failure.NODE: 2}, Start("a", delay=32.0)),
        ({}, {}, {Failure.STORAGE: 2, Failure.NODE: 2}, Start("a", delay=60.0)),
        ({}, {}, {MEMORY: 1}, GIVEN_UP),  # with as much as before it would fail as before
        ({"memory": 8}, {}, {MEMORY: 1}, Start("a", eased=1)),
        ({"memory": 8}, {}, {MEMORY: 2}, GIVEN_UP),
        ({"memory": 9}, {}, {MEMORY: 1}, GIVEN_UP),  # twice as much is more than there is
        ({"memory": 8, "out_of_memory": "nothing"}, {}, {MEMORY: 1}, GIVEN_UP),
        ({}, TRAINS, {MEMORY: 1}, Start("a", eased=1)),
        ({"out_of_memory": "nothing"}, TRAINS, {MEMORY: 1}, GIVEN_UP),
        ({}, {**TRAINS, "params": {"batch_size": 9, "micro_batch_size": 1}}, {MEMORY: 1}, GIVEN_UP),
    ],
)
def test_what_is_tried_again_and_how(asks, changes, failed, expected):
    steps = planned(a=("", 0)).steps
    only = replace(steps["a"], resources=Resources(**asks), **changes)
    plan = replace(planned(a=("", 0)), steps={"a": only})
    (decision,) = decide(plan, Progress(failures={"a": failed}), Capacity(cpus=1, gpus=0, memory=16), budgets=BUDGETS)
    assert decision == (Finish(failed=("a",), skipped=()) if expected == GIVEN_UP else expected)


@pytest.mark.parametrize(
    ("asks", "params", "times", "expected"),
    [
        ({}, {"micro_batch_size": None}, 0, None),
        ({}, {"micro_batch_size": None}, 1, 4),
        ({"workers": 2, "strategy": "ddp"}, {"micro_batch_size": None}, 1, 2),
        ({"workers": (1, 3), "strategy": "ddp"}, {"micro_batch_size": None}, 1, 1),  # less than 3 hold, and 1 holds
        ({}, {"micro_batch_size": 6}, 1, 3),
        ({}, {"micro_batch_size": 6}, 2, 1),
        ({}, {"micro_batch_size": 2}, 9, 1),
    ],
)
def test_a_smaller_micro_batch_is_half_of_what_a_worker_held(asks, params, times, expected):
    step = replace(
        planned(a=("", 0)).steps["a"], trains=True, params={"batch_size": 9, **params}, resources=Resources(**asks)
    )
    after = eased(step, times)
    assert after.params == {"batch_size": 9, "micro_batch_size": expected}
    assert (after.resources, after.fingerprint) == (step.resources, step.fingerprint)


def test_more_memory_is_what_the_step_holds_while_it_runs_again():
    steps = dict(planned(a=("", 0), b=("", 0)).steps)
    steps = {n: replace(s, resources=Resources(memory=8)) for n, s in steps.items()}
    plan = replace(planned(), steps=steps)
    assert eased(steps["a"], 1).resources.memory == 16
    there = Capacity(cpus=8, gpus=0, memory=23)
    again = Progress(running=frozenset({"a"}), failures={"a": {MEMORY: 1}})
    assert decide(plan, again, there) == ()
    assert decide(plan, replace(again, failures={}), there) == (Start("b"),)


def test_a_step_whose_number_of_workers_may_change_is_held_to_the_fewest():
    asks = Resources(workers=(2, 8), strategy="ddp", memory=3)
    plan = planned(a=("", 0), b=("", 0))
    plan = replace(plan, steps={n: replace(s, resources=asks) for n, s in plan.steps.items()})
    assert decide(plan, Progress(), Capacity(cpus=4, gpus=0, memory=12)) == (Start("a"), Start("b"))
    assert decide(plan, Progress(), Capacity(cpus=4, gpus=0, memory=11)) == (Start("a"),)
    assert decide(plan, Progress(running=frozenset({"a"})), Capacity(cpus=4, gpus=0, memory=12)) == (Start("b"),)


def test_memory_is_counted_for_every_worker():
    asks = {"big": Resources(workers=2, memory=3 << 30)}
    assert infeasible(asks, Capacity(cpus=8, gpus=0, memory=6 << 30)) == []
    (problem,) = infeasible(asks, Capacity(cpus=8, gpus=0, memory=5 << 30))
    assert str(problem).startswith("step 'big': asks for 6.44 GB of memory, expected at most 5.37 GB, which is all")


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ({"cpus_per_worker": 8}, []),
        ({"cpus_per_worker": 9}, ["asks for 9 CPUs, expected at most 8"]),
        ({"workers": 3, "strategy": "ddp", "cpus_per_worker": 3}, ["asks for 9 CPUs, expected at most 8"]),
        ({"gpus_per_worker": 3, "accelerator": "H100"}, ["asks for 3 GPUs, expected at most 1"]),
        ({"gpus_per_worker": 1, "accelerator": "H100"}, []),
        ({"gpus_per_worker": 1, "accelerator": "gpu"}, []),
        (
            {"gpus_per_worker": 1, "accelerator": "H1000"},
            ["asks for the accelerator 'H1000', expected 'gpu' or what there is: A100, H100."],
        ),
        (
            {"gpus_per_worker": 2, "accelerator": "gpu", "cpus_per_worker": 9},
            ["asks for 9 CPUs", "asks for 2 GPUs, expected at most 1"],
        ),
    ],
)
def test_more_than_there_can_ever_be_is_named_for_each_kind_of_resource(asks, said):
    there = Capacity(cpus=8, gpus=1, accelerators=frozenset({"H100", "A100"}))
    found = infeasible({"a": Resources(**asks)}, there)
    assert len(found) == len(said)
    for problem, sentence in zip(found, said, strict=True):
        assert str(problem).startswith(f"step 'a': {sentence}")
        assert problem.path[:3] == ("steps", "a", "resources")


def test_an_accelerator_is_no_problem_where_nobody_knows_which_there_are():
    asks = {"a": Resources(gpus_per_worker=1, accelerator="H1000")}
    assert infeasible(asks, Capacity(cpus=8, gpus=1)) == []


NO_GPU = "asks for 1 GPU, expected at most 0, which is all there is. Lower it, or run it on a larger cluster."


@pytest.mark.parametrize(
    ("waited", "running", "expected"),
    [
        ({}, (), (Wait("one", NO_GPU), Wait("two", NO_GPU))),
        ({"one": 599.0}, ("two",), (Wait("one", NO_GPU),)),
        ({"one": 600.0, "two": 1.0}, (), (Refuse("one", NO_GPU), Wait("two", NO_GPU))),
    ],
)
def test_what_nothing_can_hold_any_more_waits_for_as_long_as_it_may(waited, running, expected):
    progress = Progress(done=frozenset({"student"}), waited=waited, running=frozenset(running))
    assert decide(TWO_EXPERTS, progress, Capacity(cpus=8, gpus=0)) == expected


@pytest.mark.parametrize(
    ("asks", "expected"),
    [
        ({"cpus_per_worker": 4}, None),
        ({"cpus_per_worker": 2, "workers": 3}, None),
        ({"cpus_per_worker": 2, "workers": (3, 99)}, None),
        ({"cpus_per_worker": 2, "workers": (4, 99)}, "asks for 8 CPUs, expected at most 6"),
        ({"cpus_per_worker": 5}, "1 x 5 CPUs, each on one machine, expected at most 0 of them; the machine that comes "
         "nearest has 4 CPUs."),
        ({"cpus_per_worker": 3, "workers": 2}, "2 x 3 CPUs, each on one machine, expected at most 1 of them; the "
         "machine that comes nearest has 4 CPUs."),
        ({"cpus_per_worker": 3, "gpus_per_worker": 1, "accelerator": "gpu"}, "1 x 3 CPUs and 1 GPU, each on one "
         "machine, expected at most 0 of them; the machine that comes nearest has 2 CPUs and 1 GPU."),
        ({"gpus_per_worker": 1, "accelerator": "A100"}, "asks for the accelerator 'A100', expected 'gpu' or what"),
        ({"gpus_per_worker": 0.5, "accelerator": "H100", "workers": 2}, None),
        ({"memory": 7, "workers": 2}, "2 x 1 CPU and 7 bytes of memory, each on one machine, expected at most 1 of"),
    ],
)  # fmt: skip
def test_each_worker_has_to_be_on_one_machine(asks, expected):
    there = Capacity.of([Node(cpus=4, memory=8), Node(cpus=2, gpus=1, memory=6, accelerators=frozenset({"H100"}))])
    problems = infeasible({"a": Resources(**asks)}, there)
    assert [expected in p.sentence for p in problems] == ([True] if expected else [])


HEAD = Node(cpus=1, memory=9, group="head")
CPU = Node(cpus=2, memory=9, group="cpu")
L4 = Node(cpus=2, gpus=1, memory=9, accelerators=frozenset({"L4"}), group="l4")
H100 = replace(L4, accelerators=frozenset({"H100"}), group="h100")
MOST = Capacity.of([CPU, CPU, L4, L4, H100])
ANY_GPU, ON_H100 = {"gpus_per_worker": 1, "accelerator": "gpu"}, {"gpus_per_worker": 1, "accelerator": "H100"}


@pytest.mark.parametrize(
    ("asks", "there", "said"),
    [
        pytest.param({}, [CPU], "", id="what there is could hold it, though others may have all of it"),
        pytest.param({}, [], "of group 'cpu' there are 0 of 2, all that there is", id="nothing is there"),
        pytest.param({}, [L4, H100], "of group 'cpu' there are 0 of 2", id="it keeps off GPUs where others come"),
        pytest.param({"cpus_per_worker": 2}, [L4], "of group 'cpu' there are 0 of 2", id="of any size"),
        pytest.param(ANY_GPU, [CPU, H100], "", id="any GPU is any GPU"),
        pytest.param(ON_H100, [CPU, L4], "of group 'h100' there are 0 of 1, all that there is are 4 CPUs and 1 GPU.",
                     id="one that is named is that"),
        pytest.param({**ANY_GPU, "workers": 2}, [L4], "", id="workers of their own begin one by one"),
        pytest.param({**ANY_GPU, "workers": 2, "strategy": "ddp"}, [L4], "of group 'l4' there are 1 of 2, of group",
                     id="those that share a model begin together"),
        pytest.param({"workers": 2, "strategy": "ddp"}, [L4, HEAD], "of group 'cpu' there are 0 of 2",
                     id="and keep off GPUs too"),
    ],
)  # fmt: skip
def test_a_step_that_was_started_waits_for_machines_that_have_yet_to_come(asks, there, said):
    asked = Resources(**asks)
    why = absent(asked, MOST, Capacity.of(there))
    assert (said in why) if said else not why
    assert why.startswith(f"asks for {asked.workers} x ") or not why


@pytest.mark.parametrize(("waited", "decision"), [(0.0, Wait), (599.0, Wait), (600.0, Refuse), (1e6, Refuse)])
def test_what_has_no_place_when_its_time_is_over_is_given_up_and_what_has_one_never(waited, decision):
    progress = Progress(done=frozenset({"student"}), running=frozenset({"one"}), waited={"one": waited})
    most = Capacity.of([CPU, CPU, H100, H100])
    first, *others = decide(TWO_EXPERTS, progress, most, living=Capacity.of([CPU]))
    assert (type(first), first.step) == (decision, "one")
    assert others == [Start("two")], "what can still come is asked for"
    assert decide(TWO_EXPERTS, progress, most, living=Capacity.of([CPU, H100])) == (Start("two"),)
    assert decide(TWO_EXPERTS, progress, most) == (Start("two"),)
