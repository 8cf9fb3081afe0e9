"""On which machines a step may be put."""

import pytest

from cluster.capacity import Capacity, Node
from operators.resources import Resources
from pipelines.placing import placed, waiting

CPU = Node(cpus=4, memory=8)
L4, H100 = (Node(cpus=16, gpus=1, memory=64, accelerators=frozenset({kind})) for kind in ("L4", "H100"))
KIND = "ray.io/accelerator-type"
GPU = {"gpus_per_worker": 1, "accelerator": "gpu"}


@pytest.mark.parametrize(
    ("nodes", "asks", "labels"),
    [
        pytest.param([CPU, L4, H100], {}, {KIND: "!in(H100,L4)"}, id="what needs no GPU gets a machine without"),
        pytest.param([CPU], {}, {}, id="where there are none there is nothing to avoid"),
        pytest.param([L4, H100], {}, {}, id="where all have some it takes one of these"),
        pytest.param([CPU, L4], {"cpus_per_worker": 8}, {}, id="and where no other is large enough"),
        pytest.param([CPU, L4], {"memory": 9}, {}, id="or has the memory"),
        pytest.param([CPU, L4], {"workers": 4}, {KIND: "!in(L4)"}, id="all workers of a group do"),
        pytest.param([CPU, L4], {"workers": 5}, {}, id="where there is room for all of them"),
        pytest.param([CPU, CPU, L4], {"workers": 5}, {KIND: "!in(L4)"}, id="on several machines too"),
        pytest.param([CPU, L4], GPU, {}, id="any GPU is any GPU"),
        pytest.param([CPU, L4, H100], {**GPU, "accelerator": "L4"}, {KIND: "L4"}, id="one that is named is that"),
        pytest.param([CPU, L4, H100], {**GPU, "avoid": ("L4",)}, {KIND: "!in(L4)"}, id="or any but some"),
        pytest.param([CPU, L4, H100], {"avoid": ("L4",)}, {KIND: "!in(L4)"}, id="without GPUs too"),
    ],
)
def test_workers_ask_for_labels(nodes, asks, labels):
    assert placed(Resources(**asks), Capacity.of(nodes)).labels == labels


@pytest.mark.parametrize(("nodes", "labels"), [([CPU, L4], {KIND: "!in(L4)"}), ([L4], {}), ([CPU], {})])
def test_what_waits_for_its_workers_is_kept_off_gpus_too(nodes, labels):
    assert waiting(Capacity.of(nodes)).labels == labels
