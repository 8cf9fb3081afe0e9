"""What a plan says of memory, time and money: tables, without files or Ray."""

import pytest

from cluster.profile import GIB, Group, Head, Profile
from operators.footprint import CONTEXT, PROCESS, Footprint
from operators.resources import Resources
from pipelines.estimates import (
    estimate,
    heavy,
    nodes_in,
    place,
    plain,
    rooms_at,
    rooms_of,
    settled,
    total,
)
from pipelines.history import shapes

CPU = {"cpus": 8, "memory_gib": 32, "max_nodes": 4, "price_per_hour": 1.0, "tflops": 2.0, "idle_timeout_s": 360.0}
SMALL = {"cpus": 8, "memory_gib": 64, "gpus": 1, "accelerator": "L4", "gpu_memory_gib": 24, "max_nodes": 4,
         "price_per_hour": 2.0, "tflops": 50.0}  # fmt: skip
LARGE = {"cpus": 32, "memory_gib": 400, "gpus": 4, "accelerator": "H100", "gpu_memory_gib": 80, "max_nodes": 2,
         "price_per_hour": 30.0, "tflops": 300.0}  # fmt: skip
PROFILE = Profile(
    name="p",
    place="kuberay",
    head=Head(cpus=2, memory_gib=8, price_per_hour=0.5),
    groups={"cpu": Group(**CPU), "l4": Group(**SMALL), "h100": Group(**LARGE)},
)
ROOMS = rooms_of(PROFILE)
CPUS = ROOMS[0]


def gpus(workers=1, **more):
    return Resources(workers=workers, gpus_per_worker=1, accelerator="gpu", **more)


def held(gib, device="cpu", **more):
    return Footprint(parameters=round(gib * GIB), device=device, **more)


@pytest.mark.parametrize(
    ("asks", "found", "where"),
    [
        (Resources(), None, ("cpu", 1)),  # no GPU for who asks for none
        (Resources(), held(20), ("cpu", 1)),
        (Resources(), held(40), ("l4", 1)),  # unless nothing else has the memory
        (Resources(), held(500), None),
        (Resources(workers=4, strategy="ddp"), held(12), ("cpu", 2)),  # two on each machine
        (Resources(workers=4, strategy="ddp", cpus_per_worker=5), held(1), ("cpu", 4)),
        (Resources(workers=9, strategy="ddp", cpus_per_worker=5), held(1), ("h100", 2)),
        (gpus(), held(10, "cuda"), ("l4", 1)),
        (gpus(), held(23.9, "cuda"), ("h100", 1)),  # a process takes some of a GPU by itself
        (gpus(), held(90, "cuda"), None),
        (gpus(5, strategy="ddp"), held(10, "cuda"), ("h100", 2)),
        (Resources(gpus_per_worker=1, accelerator="H100"), held(1, "cuda"), ("h100", 1)),
    ],
)
def test_a_step_goes_to_the_cheapest_machines_that_hold_it(asks, found, where):
    placed = place(ROOMS, asks, found)
    assert (None if placed is None else (placed[0].name, placed[1])) == where


def test_the_head_computes_only_where_it_may():
    alone = Profile(name="p", place="local", head=Head(cpus=2, memory_gib=8, price_per_hour=3.0))
    assert [(r.name, r.price) for r in rooms_of(alone)] == [("head", 0.0)]  # it is paid for anyway
    assert "head" not in [r.name for r in ROOMS]


def test_machines_that_are_alike_are_one_kind():
    (one,) = rooms_at(Profile(name="p", place="kuberay", head=Head(cpus=2, memory_gib=8), groups={
        "a": Group(cpus=4, memory_gib=4, max_nodes=3)}).capacity())  # fmt: skip
    assert (one.max_nodes, one.cpus) == (3, 4)
    assert nodes_in(one, Resources(workers=6, strategy="ddp", cpus_per_worker=2), None) == 3


def shared(whole, device="cuda"):
    """A model of which a strategy leaves each worker less: 4 parts of weights and gradients, 8 of moments."""

    def ask(name, asks):
        n = asks.workers
        parts = {"single": 16, "ddp": 16, "zero1": 8 + 8 / n, "zero2": 4 + 12 / n, "zero3": 16 / n}[asks.strategy]
        away = {"zero2": 8 / n, "zero3": 12 / n}.get(asks.strategy, 8 / n) if asks.offload == "cpu" else 0
        return held((parts - away) * whole, device, offloaded=round(away * whole * GIB))

    return ask


ALL = ("single", "ddp", "zero1", "zero2", "zero3")


@pytest.mark.parametrize(
    ("whole", "workers", "allowed", "chosen"),
    [
        (1, 1, ALL, ("single", "none")),
        (1, 4, ALL, ("ddp", "none")),
        (6, 4, ALL, ("zero1", "none")),  # 96 GiB whole, 60 with moments shared
        (9, 4, ALL, ("zero2", "none")),
        (16, 4, ALL, ("zero3", "none")),
        (60, 4, ALL, ("zero3", "cpu")),
        (6, 1, ALL, ("zero1", "cpu")),  # one worker can share nothing but with its host
        (6, 4, ("single", "ddp"), None),  # its method cannot be trained otherwise
        (500, 4, ALL, None),
    ],
)
def test_auto_takes_the_first_strategy_that_fits(whole, workers, allowed, chosen):
    asks = gpus(workers, strategy="auto")
    found, problems = settled({"a": asks}, shared(whole), ROOMS, lambda name: allowed)
    if chosen is None:
        (problem,) = problems
        assert "step 'a': strategy='auto': the least that any takes is " in str(problem)
        assert " GiB, expected one that fits. Lower micro_batch_size" in str(problem)
        return
    assert problems == []
    assert (found["a"].strategy, found["a"].offload) == chosen


def test_what_nobody_can_count_is_left_as_it_moves_least():
    asks = {"a": Resources(workers=2, strategy="auto"), "b": Resources(strategy="zero2")}
    found, problems = settled(asks, lambda name, asks: None, ROOMS, lambda name: ALL)
    assert (problems, {n: r.strategy for n, r in found.items()}) == ([], {"a": "ddp"})


def test_more_memory_than_any_machine_has_is_a_problem():
    asks = {"a": Resources(), "b": gpus(), "c": Resources(cpus_per_worker=100)}  # `infeasible` says of c
    known = {"a": held(500), "b": held(90, "cuda"), "c": held(500)}
    said = [str(problem) for problem in heavy(asks, known, ROOMS)]
    least = 500 + PROCESS / GIB
    assert said == [
        f"step 'a': a worker takes {least:.1f} GiB of memory, and 'h100' has 400.0 GiB, expected no more than that. "
        "Lower micro_batch_size or length, set strategy to auto, or take larger machines.",
        f"step 'b': a worker takes {90 + CONTEXT / GIB:.1f} GiB of a GPU's memory, and 'h100' has 80.0 GiB, expected "
        "no more than that. Lower micro_batch_size or length, set strategy to auto, or take larger machines.",
    ]


def test_times_are_those_of_earlier_runs_or_of_operations_or_unknown():
    run = estimate("runs", Resources(), held(1, flops=1e15), ROOMS, (3600.0, 1800.0))
    assert (run.seconds, run.source, run.cost) == ((1800.0, 3600.0), "earlier runs", (0.5, 1.0))
    counted = estimate("runs", Resources(cpus_per_worker=4), held(1, flops=1e15), ROOMS, ())
    assert (counted.seconds, counted.source) == ((1000.0, 2000.0), "operations")  # half of a machine's 2 TFLOPS
    trained = estimate("runs", gpus(2, strategy="ddp"), held(1, "cuda", flops=1e15), ROOMS, ())
    assert trained.seconds == (10.0, 20.0)
    nothing = estimate("runs", Resources(), held(1), ROOMS, ())
    assert (nothing.seconds, nothing.source, nothing.cost, nothing.room) == (None, "", None, "cpu")
    assert estimate("stored", Resources(), None, ROOMS, (1.0,)).cost is None
    assert plain(counted)["memory"] == {"parameters": GIB, "flops": 1e15}


def test_both_ends_of_a_number_of_workers_are_estimated():
    asks = Resources(workers=(1, 9), strategy="ddp", cpus_per_worker=8)
    found = estimate("runs", asks, Footprint(flops=8e12), [CPUS], ())
    assert (found.fewest, found.nodes) == (1, 4)  # of nine there is room for four
    # 2 tflops a machine: 4 s on one and 1 s on four, each perhaps twice as long
    assert found.seconds == (1.0, 8.0)
    assert found.cost == (pytest.approx(4 / 3600), pytest.approx(8 / 3600))
    measured = estimate("runs", asks, None, [CPUS], (3600.0,))
    assert (measured.seconds, measured.cost) == ((3600.0, 3600.0), (1.0, 4.0))
    alone = estimate("runs", asks.among(1), Footprint(flops=8e12), [CPUS], ())
    assert (alone.fewest, alone.nodes, alone.seconds) == (1, 1, (4.0, 8.0))


def test_the_fewest_workers_decide_whether_a_step_fits_and_how_it_shares():
    asks = gpus((1, 4), strategy="auto")
    found, problems = settled({"a": asks}, lambda name, asks: held(16, "cuda"), ROOMS, lambda name: ALL)
    assert (problems, found["a"].strategy, found["a"].workers) == ([], "ddp", (1, 4))


def test_the_total_follows_the_longest_way_and_pays_for_head_and_idle_machines():
    hour = estimate("runs", Resources(), None, ROOMS, (3600.0,))
    unknown = estimate("runs", Resources(), None, ROOMS, ())
    each = {"a": hour, "b": hour, "c": hour, "d": unknown}
    found = total(each, {"a": (), "b": ("a",), "c": ("a",), "d": ("c",)}, PROFILE)
    assert found.seconds == (7200.0, 7200.0)
    assert found.steps == (3.0, 3.0)
    assert found.head == (1.0, 1.0)
    assert found.idle == (pytest.approx(0.1), pytest.approx(0.1))  # six minutes of a machine
    assert found.cost == (pytest.approx(4.1), pytest.approx(4.1))
    assert found.unknown == ("d",)


def step(operator="tune", inputs=None, **params):
    asks = {"workers": 1, "strategy": "single", "offload": "none", "cpus_per_worker": 1, "gpus_per_worker": 0,
            "accelerator": "cpu"}  # fmt: skip
    return {"operator": operator, "method": None, "params": params, "inputs": inputs or {}, "resources": asks}


def test_steps_are_alike_that_differ_in_seeds_and_contents_alone():
    inputs = {"m": {"uri": "hf://a/b@1"}, "n": {"uri": "hf://a/b@2"}, "o": {"uri": "hf://a/c"}}
    steps = {
        "a": step(inputs={"model": "m"}, length=5, seed=1),
        "b": step(inputs={"model": "n"}, length=5, seed=2),
        "c": step(inputs={"model": "o"}, length=5),
        "d": step(inputs={"model": "m"}, length=6),
        "e": step("merge", {"experts": ["a", "b"]}),
        "f": step("merge", {"experts": ["b", "a"]}),
        "g": step("merge", {"experts": ["a", "c"]}),
    }
    found = shapes(steps, inputs)
    assert found["a"] == found["b"]
    assert found["e"] == found["f"]
    assert len({found[n] for n in "acdeg"}) == 5
