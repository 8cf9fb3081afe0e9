"""Decisions as tables: no Ray, no clock, no files."""

import pytest

from cluster.capacity import Capacity
from operators.resources import Resources
from pipelines.plan import Plan, PlannedStep
from pipelines.schedule import Finish, Progress, Reuse, Start, decide, infeasible
from pipelines.spec import Spec


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
            Progress(done=frozenset({"student", "two"}), failures={"one": 1}),
            ALL,
            (Finish(failed=("one",), skipped=("endpoint",)),),
            id="what needs a failed step never starts",
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


def test_a_step_is_tried_again_while_it_may_fail():
    progress = Progress(failures={"student": 2})
    assert decide(TWO_EXPERTS, progress, ALL, max_failures=2) == (Start("student"),)
    assert isinstance(decide(TWO_EXPERTS, progress, ALL, max_failures=1)[0], Finish)


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
