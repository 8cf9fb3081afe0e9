"""How many workers have room on a cluster, beside whoever waits."""

import pytest

from operators.resources import Resources
from operators.sharing.room import Node, Room, Rule, Spot, spot

ASKS = Resources(workers=(1, 4), strategy="ddp", cpus_per_worker=2)
GPUS = Resources(workers=(1, 8), strategy="ddp", gpus_per_worker=0.5, accelerator="H100")
H100 = {"ray.io/accelerator-type": "H100"}


def node(name="a", labels=None, **free):
    return Node(name=name, free=free, labels=labels or {})


def cpus(number):
    return (Spot(needs={"CPU": number}),)


def test_a_worker_needs_what_each_is_given():
    assert spot(ASKS) == Spot(needs={"CPU": 2})
    held = Resources(memory=7, gpus_per_worker=0.5, accelerator="H100")
    label = Rule(label="ray.io/accelerator-type", values=frozenset({"H100"}))
    assert spot(held) == Spot(needs={"CPU": 1, "GPU": 0.5, "memory": 7}, rules=(label,))


@pytest.mark.parametrize(
    ("nodes", "waiting", "expected"),
    [
        ([], [], 0),
        ([node(CPU=3), node(CPU=5)], [], 3),  # each on one machine: 1 + 2
        ([node(CPU=99)], [], 4),
        ([node(GPU=4)], [], 0),
        ([node(CPU=8)], [cpus(1)], 3),
        ([node(CPU=8)], [cpus(2), cpus(2)], 2),
        ([node(CPU=4)], [cpus(3)], 2),  # beside him not even the fewest would have room
        ([node(CPU=4)], [cpus(9), cpus(2)], 1),  # nothing could hold the first one anyway
        ([node(CPU=4), node(CPU=4)], [(*cpus(2), *cpus(2))], 2),
        ([node(CPU=4), node(CPU=2)], [(*cpus(4), *cpus(4))], 3),  # all of a gang's spots, or none
        ([node(CPU=4)], [cpus(0)], 2),
    ],
)
def test_as_many_workers_have_room_as_whoever_waits_leaves(nodes, waiting, expected):
    assert Room(nodes=tuple(nodes), waiting=tuple(waiting)).for_workers(ASKS) == expected


def test_labels_say_where_a_worker_or_who_waits_may_be():
    nodes = (node("a", H100, CPU=8, GPU=1), node("b", {"ray.io/accelerator-type": "L4"}, CPU=8, GPU=4))
    assert Room(nodes=nodes).for_workers(GPUS) == 2
    elsewhere = Rule(label="ray.io/accelerator-type", values=frozenset({"H100"}), among=False)
    not_there = (Spot(needs={"CPU": 8}, rules=(elsewhere,)),)
    assert Room(nodes=nodes, waiting=(not_there,)).for_workers(GPUS) == 2  # it takes the other machine
    there = (Spot(needs={"CPU": 7.5}, rules=spot(GPUS).rules),)
    assert Room(nodes=nodes, waiting=(there,)).for_workers(GPUS) == 2  # and here there is not enough for both


def test_what_a_step_has_is_there_for_it_and_for_others_once_it_lets_go():
    there = Room(nodes=(node("a", CPU=1), node("b")), waiting=(cpus(3),))
    assert there.for_workers(ASKS) == 0
    assert there.besides({"a": 1, "b": 2, "gone": 5}, ASKS).for_workers(ASKS) == 2  # 3 of a's go to who waits


def test_shares_of_a_device_add_up_in_spite_of_rounding():
    tenth = Resources(workers=(1, 16), strategy="ddp", gpus_per_worker=0.1, accelerator="gpu")
    assert Room(nodes=(node(CPU=16, GPU=0.1 + 0.7),)).for_workers(tenth) == 8
