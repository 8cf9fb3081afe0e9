"""Classes of failures as a table."""

import errno

import pytest
import ray.exceptions
import torch
from ray.train import WorkerGroupError

from lfm.errors import HyperparameterError
from operators.learning.trainer import GroupFailed
from operators.sharing.notices import NodeLost, Preempted, Stopped
from pipelines.execute import Terminated
from pipelines.failures import BUDGETS, Failure, classify
from pipelines.storage.base import StorageFailed, UnusableStore

USER, MEMORY, NODE, STORAGE, OTHER = Failure.USER, Failure.MEMORY, Failure.NODE, Failure.STORAGE, Failure.OTHER
PREEMPTION = Failure.PREEMPTION


def raised(error, cause=None):
    """The error as it is when it has been raised, from its cause."""
    try:
        raise error from cause
    except type(error) as caught:
        return caught


def group(workers):
    """What the trainer raises when workers failed."""
    return raised(GroupFailed("worker 0", "it failed"), WorkerGroupError("some failed", workers))


def preempted():
    """What Ray says of an actor whose node was taken away."""
    return ray.exceptions.RayActorError("a", "gone", False, True)


LOST = ConnectionError("closed by peer")


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ValueError("a bug"), USER),
        (KeyError("a bug"), USER),
        (ZeroDivisionError(), USER),
        (ModuleNotFoundError("no such library"), USER),
        (SystemExit(1), USER),
        (HyperparameterError("lora", "rank", 0, "rank > 0"), USER),
        (raised(HyperparameterError("lora", "rank", 0, "rank > 0"), LOST), USER),
        (MemoryError(), MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), MEMORY),
        (RuntimeError("CUDA error: out of memory"), MEMORY),
        (raised(ValueError("no step"), MemoryError()), MEMORY),
        (ray.exceptions.OutOfMemoryError("killed by the node's monitor"), MEMORY),
        (StorageFailed("store", "no space left on device"), STORAGE),
        (UnusableStore("store", "read-only file system"), STORAGE),
        (raised(RuntimeError("could not save"), OSError(errno.ENOSPC, "no space left")), STORAGE),
        (OSError(errno.EIO, "input/output error"), STORAGE),
        (FileNotFoundError(errno.ENOENT, "no such file"), OTHER),
        (ray.exceptions.NodeDiedError("gone"), NODE),
        (Terminated("asked to end"), OTHER),
        (ray.exceptions.WorkerCrashedError(), OTHER),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), OTHER),
        (LOST, OTHER),
        (group({0: LOST, 1: ValueError("a bug")}), USER),
        (group({0: LOST, 1: torch.OutOfMemoryError("CUDA out of memory")}), MEMORY),
        (group({0: LOST}), OTHER),
        (raised(NodeLost("worker 0", "closed", ("n1",)), WorkerGroupError("some failed", {0: LOST})), NODE),
        (group({0: LOST, 1: Preempted(3, 9)}), PREEMPTION),
        (Preempted(3, 9), PREEMPTION),
        (Stopped(3, 9), PREEMPTION),
        (preempted(), PREEMPTION),
    ],
    ids=repr,
)
def test_the_class_of_a_failure(error, failure):
    assert classify(error) is failure


def test_errors_that_were_raised_from_each_other_come_to_an_end():
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert classify(one) is OTHER


def test_every_class_has_a_budget_and_a_mistake_has_none():
    assert BUDGETS.keys() == set(Failure)
    assert (BUDGETS[USER], BUDGETS[MEMORY]) == (0, 1)
