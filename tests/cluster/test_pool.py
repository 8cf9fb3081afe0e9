"""Where a task's node may lie."""

import pytest

from cluster.capacity import Node
from cluster.pool import selector

CPU = Node(cpus=4, memory=8)
L4, H100 = (Node(cpus=16, gpus=1, memory=64, accelerators=frozenset({kind})) for kind in ("L4", "H100"))
KIND = "ray.io/accelerator-type"


@pytest.mark.parametrize(
    ("nodes", "asks", "labels"),
    [
        pytest.param([CPU, L4, H100], {}, {KIND: "!in(H100,L4)"}, id="what needs no GPU gets a machine without"),
        pytest.param([CPU], {}, {}, id="where there are none there is nothing to avoid"),
        pytest.param([L4, H100], {}, {}, id="where all have some it takes one of these"),
        pytest.param([CPU, L4], {"cpus": 8}, {}, id="and where no other is large enough"),
        pytest.param([CPU, L4], {"memory": 9}, {}, id="or has the memory"),
        pytest.param([CPU, L4], {"gpus": 1}, {}, id="any GPU is any GPU"),
        pytest.param([CPU, L4, H100], {"gpus": 1, "accelerator": "L4"}, {KIND: "L4"}, id="one that is named is that"),
    ],
)
def test_a_task_asks_for_labels(nodes, asks, labels):
    assert selector(nodes, **{"cpus": 1, "gpus": 0, "memory": 0, "accelerator": "", **asks}) == labels
