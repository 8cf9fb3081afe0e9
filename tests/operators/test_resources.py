"""What a step asks for, and that whoever starts its workers says so."""

import pytest

from operators import serving
from operators.resources import Resources, ResourcesError
from operators.sharing import crew, parts

KIND = "ray.io/accelerator-type"
ASKS = Resources(workers=2, cpus_per_worker=3, memory=7, avoid=("H100", "L4"))


@pytest.mark.parametrize(
    ("asks", "labels"),
    [
        ({}, {}),
        ({"avoid": ("L4",)}, {KIND: "!in(L4)"}),
        ({"gpus_per_worker": 1, "accelerator": "gpu"}, {}),
        ({"gpus_per_worker": 1, "accelerator": "L4"}, {KIND: "L4"}),
    ],
)
def test_the_labels_that_nodes_must_have(asks, labels):
    assert Resources(**asks).labels == labels


def test_who_names_a_gpu_avoids_none():
    with pytest.raises(ResourcesError, match=r"avoid=.*, expected none with an accelerator that is named"):
        Resources(gpus_per_worker=1, accelerator="L4", avoid=("H100",))


@pytest.mark.parametrize("asked", [crew.asked(ASKS), parts._asked(ASKS, 2), serving._asks(ASKS)])
def test_workers_ask_for_what_the_step_does(asked):
    assert (asked["num_cpus"], asked["memory"]) == (3, 7)
    assert asked["label_selector"] == {KIND: "!in(H100,L4)"}
