"""What nodes and jobs that were seen add up to."""

import pytest

from cluster.profile import Group, Head, Profile
from cluster.seen import Seen, SeenJob, SeenNode

PROFILE = Profile(
    name="p",
    place="local",
    head=Head(cpus=1, memory_gib=1, price_per_hour=0.5),
    groups={"gpu": Group(cpus=1, memory_gib=1, gpus=1, accelerator="L4", price_per_hour=2.0)},
)
HOUR = 3600.0


def node(group, began, ended=0.0, idle=0.0):
    return SeenNode(
        id="1", name=group, group=group, market="", alive=not ended, began=began, ended=ended, cpus=1, gpus=0,
        idle_s=idle,
    )  # fmt: skip


def seen(*nodes, running=()):
    jobs = tuple(SeenJob(id="1", does="python", began=0.0, running=r) for r in running)
    return Seen(time=4 * HOUR, nodes=nodes, jobs=jobs)


def test_hours_are_those_of_living_and_of_dead_nodes_and_cost_what_their_group_costs():
    now = seen(node("head", 0.0), node("gpu", HOUR, 2 * HOUR), node("gpu", 3.5 * HOUR), node("", 3 * HOUR))
    assert now.hours() == pytest.approx({"head": 4.0, "gpu": 1.5, "": 1.0})
    assert PROFILE.cost(now.hours()) == pytest.approx(4 * 0.5 + 1.5 * 2.0)


@pytest.mark.parametrize(
    ("nodes", "running", "idle"),
    [
        ([node("head", 0.0, idle=90.0), node("gpu", 0.0, idle=70.0)], [], 70.0),
        ([node("head", 0.0, idle=90.0), node("gpu", 0.0, 1.0)], [False], 90.0),
        ([node("head", 0.0, idle=90.0)], [False, True], 0.0),
        ([node("head", 0.0, idle=90.0), node("gpu", 0.0)], [], 0.0),
        ([], [], 0.0),
    ],
)
def test_a_cluster_is_idle_for_as_long_as_no_job_runs_and_no_living_node_works(nodes, running, idle):
    assert seen(*nodes, running=running).idle_s == idle
