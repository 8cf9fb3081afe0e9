"""What a profile may say, and what it says of machines and prices."""

import pytest

from cluster.profile import GIB, Group, Head, Profile, ProfileError

HEAD = Head(cpus=4, memory_gib=16, price_per_hour=0.2)
CPU = Group(cpus=16, memory_gib=64, max_nodes=4, price_per_hour=0.7)
H100 = Group(cpus=24, memory_gib=200, gpus=1, accelerator="H100", max_nodes=8, price_per_hour=3.0)
SPOT = Group(
    cpus=24,
    memory_gib=200,
    gpus=1,
    accelerator="H100",
    max_nodes=8,
    price_per_hour=1.2,
    market="spot",
    fallback="h100",
)


def profile(**fields):
    return Profile(**{"name": "p", "place": "kuberay", "head": HEAD, **fields})


def test_all_that_its_groups_may_grow_to_is_there_for_steps():
    there = profile(groups={"cpu": CPU, "h100": H100}).capacity()
    assert (there.cpus, there.gpus, there.memory) == (4 * 16 + 8 * 24, 8, (4 * 64 + 8 * 200) * GIB)
    assert there.accelerators == {"H100"}
    assert len(there.nodes) == 12


def test_nobody_adds_processes_of_this_machine_so_there_are_as_many_as_there_are_at_least():
    there = profile(place="local", groups={"cpu": Group(cpus=16, memory_gib=64, min_nodes=2, max_nodes=4)})
    assert there.capacity().cpus == 32


def test_a_cluster_is_idle_when_its_most_patient_group_is():
    patient = Group(cpus=1, memory_gib=1, idle_timeout_s=900)
    assert (profile().idle_s, profile(groups={"cpu": CPU, "patient": patient}).idle_s) == (60, 900)


def test_steps_compute_on_the_head_where_it_says_so_or_is_all_there_is():
    assert profile().capacity().cpus == 4
    assert profile(groups={"cpu": CPU}).capacity().cpus == 64
    there = Head(cpus=4, memory_gib=16, steps=True)
    assert profile(head=there, groups={"cpu": CPU}).capacity().cpus == 68


def test_a_cost_is_that_of_head_and_nodes_over_hours():
    there = profile(groups={"cpu": CPU, "h100": H100})
    assert there.cost({"head": 3, "h100": 6, "cpu": 1.5, "other": 9}) == pytest.approx(3 * 0.2 + 6 * 3.0 + 1.5 * 0.7)
    assert there.cost({}) == 0.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "Mine"}, "profile: name='Mine', expected at most 40 small letters"),
        ({"name": "x" * 41}, "expected at most 40"),
        ({"groups": {"head": CPU}}, "none called 'head'"),
        (
            {"groups": {"spot": SPOT}},
            "profile: groups.spot.fallback='h100', expected an on-demand group: there is none",
        ),
        ({"groups": {"h100": SPOT}}, "expected an on-demand group: there is none"),
        ({"place": "address"}, "profile: address='', expected where the cluster is"),
        ({"address": "ray:6379"}, "expected none, or place: address"),
        ({"place": "aws"}, "profile: region='', expected the region"),
        ({"place": "aws", "region": "eu-west-1"}, "profile: head.type='', expected what aws calls the machine"),
        ({"place": "gcp", "region": "europe-west4"}, "profile: project='', expected the project's id"),
        ({"region": "eu-west-1"}, "expected none, or place: aws or gcp"),
        ({"token": "s3cr3t"}, "profile: token='...', expected env:NAME"),
        ({"token": "env:"}, "profile: token='...', expected env:NAME"),
        ({"place": "local", "token": "secret:ray"}, "expected env:NAME or file:PATH outside of Kubernetes"),
        ({"shared": ("nfs",)}, "profile: shared=('nfs',), expected absolute paths"),
        ({"drain_s": 1}, "drain_s >= 10"),
    ],
)
def test_what_no_cluster_could_be_is_refused(fields, said):
    with pytest.raises(ProfileError) as refused:
        profile(**fields)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cpus": 0}, "group: cpus=0, expected cpus > 0"),
        ({"memory_gib": 0}, "memory_gib > 0"),
        ({"gpus": 1}, "expected a name such as 'H100' if gpus > 0"),
        ({"accelerator": "H100"}, "expected a name such as 'H100' if gpus > 0"),
        ({"max_nodes": 0}, "max_nodes >= 1"),
        ({"min_nodes": 2}, "group: min_nodes=2, expected 0 to 1, its max_nodes"),
        ({"price_per_hour": -1}, "price_per_hour >= 0"),
        ({"fallback": "other"}, "expected none, or market: spot"),
        ({"labels": {"ray.io/market-type": "spot"}}, "expected names outside of 'ray.io/'"),
    ],
)
def test_what_no_machine_could_be_is_refused(fields, said):
    with pytest.raises(ProfileError) as refused:
        Group(**{"cpus": 1, "memory_gib": 1, **fields})
    assert said in str(refused.value)


def test_a_head_has_gpus_only_for_steps():
    with pytest.raises(ProfileError, match="head: gpus=1, expected 0, or steps: true"):
        Head(cpus=1, memory_gib=1, gpus=1, accelerator="H100")


@pytest.mark.parametrize(
    ("uri", "readable"),
    [
        ("s3://bucket/lfm", True),
        ("hf://name", True),
        ("/nfs/lfm", True),
        ("file:///nfs/lfm", True),
        ("/nfs2/lfm", False),
        (".lfm", False),
        ("http://mlflow.internal:5000", True),
        ("http://localhost:5000", False),
        ("http://user:word@127.0.0.1/x", False),
        ("http://[::1]:5000", False),
        ("sqlite:////nfs/runs.db", True),
        ("sqlite:////tmp/runs.db", False),
        ("sqlite:///runs.db", False),
    ],
)
def test_what_other_machines_can_read(uri, readable):
    assert profile(groups={"cpu": CPU}, shared=("/nfs",)).readable(uri) is readable
    assert profile(shared=("/nfs",)).readable(uri), "one machine reads what it has"
