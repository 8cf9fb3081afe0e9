"""Machines that go: what a step says of one that is lost, and whether its own, or its run, is about to end."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lfm.errors import LfmError

ASK_S = 1.0  # how late a process hears of it
NODE_S = 10.0  # how long it may take the cluster to see that a node is gone
SILENT_S = 60.0  # the same where nothing was heard of a worker any more, which is how a machine without power goes


class Preempted(LfmError, RuntimeError):
    """A step that ended because its machine is about to be taken away; what it had done is kept."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(done, total)
        self.done, self.total = done, total

    def __str__(self) -> str:
        return (
            f"its machine is about to be taken away, expected one that stays for all {self.total} steps. What it had "
            f"done after {self.done} is kept, and another machine goes on from there."
        )


class Stopped(Preempted):
    """The same where it is the run that ends."""

    def __str__(self) -> str:
        return (
            f"its run is about to end, expected it to go on for all {self.total} steps. What it had done after "
            f"{self.done} is kept, and lfm resume goes on from there."
        )


class NodeLost(LfmError, RuntimeError):
    """A group of workers of which a machine was lost."""

    def __init__(self, who: str, what: str, nodes: tuple[str, ...]) -> None:
        super().__init__(who, what, nodes)
        self.who, self.what, self.nodes = who, what, nodes

    def __str__(self) -> str:
        gone = ", ".join(self.nodes)
        return (
            f"{self.who}: {self.what}; node {gone} is gone, expected it to stay. Another one goes on from what is kept."
        )


class FolderNotShared(LfmError, RuntimeError):
    """A worker on a machine that does not see the step's files."""

    def __init__(self, rank: int, folder: str) -> None:
        super().__init__(rank, folder)
        self.rank, self.folder = rank, folder

    def __str__(self) -> str:
        return (
            f"worker {self.rank}: cannot see {self.folder!r}, expected the store on storage that every machine mounts. "
            "Move the store there, or keep the workers on one machine."
        )


@dataclass(slots=True)
class Notices:
    """What Ray says of this process's node, and its driver of the run; asked at most once in `ASK_S`."""

    _due: float = 0.0
    _leaving: bool = False

    def leaving(self) -> bool:
        """Whether the node is about to be taken away, or the run ends; never where there is no Ray."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return False
        now = time.monotonic()
        if now >= self._due and not self._leaving:
            self._due = now + ASK_S
            draining = ray._private.state.state.get_draining_nodes()
            self._leaving = ray.get_runtime_context().get_node_id() in draining or recalled()
        return self._leaving


@contextmanager
def recall() -> Iterator[None]:
    """Meanwhile every process that works for this driver hears that it is leaving: it keeps what it has, and ends."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_recall_key(), b"1")
    try:
        yield
    finally:
        internal_kv._internal_kv_del(_recall_key())


def recalled() -> bool:
    """Whether the run to which this process belongs has asked it to end; never where there is no Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    from ray.experimental import internal_kv

    return bool(internal_kv._internal_kv_exists(_recall_key()))


def _recall_key() -> bytes:
    """Ray's name of the driver, which its tasks and workers have too."""
    import ray

    return f"lfm-recall-{ray.get_runtime_context().get_job_id()}".encode()


def nodes() -> frozenset[str]:
    """The nodes of the cluster that live."""
    import ray

    return frozenset(n["NodeID"] for n in ray.nodes() if n["Alive"])


def lost_with(who: str, error: BaseException, before: frozenset[str]) -> NodeLost | None:
    """That `who` was lost with its machine, where what Ray raised means that; None where all of `before` are there."""
    gone = lost_since(before, SILENT_S if type(error).__name__ == "ActorUnavailableError" else NODE_S)
    return NodeLost(who, str(error).strip().partition("\n")[0].rstrip("."), gone) if gone else None


def lost_since(before: frozenset[str], wait_s: float = NODE_S) -> tuple[str, ...]:
    """Those of `before` that are gone: the cluster sees that later than a process sees that another one is."""
    until = time.monotonic() + wait_s
    while not (lost := before - nodes()) and time.monotonic() < until:
        time.sleep(0.2)
    return tuple(sorted(lost))
