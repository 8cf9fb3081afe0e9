"""Tasks -> what became of them: the only place that hands work to Ray, each piece tried once."""

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.capacity import Capacity
from cluster.connect import capacity, cluster, groups, leaving, living, session
from cluster.profile import GROUP_LABEL
from lfm.errors import LfmError


class ClusterLost(LfmError, ConnectionError):
    """The Ray of this machine, which has died under a run."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"Ray of this machine: it has died ({self.what}), expected it to live on. Go on with lfm resume."


Handle = Any
"""What `Pool.start` gave; it has a hash."""


@dataclass(frozen=True, slots=True)
class Began:
    """A task has its place and works: on a node, of a group; the group is empty where its node is of none."""

    handle: Handle
    node: str
    group: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """A task has answered, or its process has not lived to."""

    handle: Handle
    answer: Any = None
    error: BaseException | None = None


class Pool:
    """The cluster to which this process is connected.

    Args:
        most: What it can grow to, where something makes it grow.
        shared: Whether other runs may be there too.
    """

    def __init__(self, most: Capacity | None = None, *, shared: bool = False) -> None:
        self._most, self._shared = most, shared

    def capacity(self) -> Capacity:
        """What it has now, or can have as soon as somebody asks for it."""
        return self._most or capacity()

    def living(self) -> Capacity:
        """What the machines have that are there, those that are about to leave too."""
        return living()

    @property
    def grows(self) -> bool:
        """Whether machines come when somebody asks for more than there is."""
        return self._most is not None

    def shared(self) -> str:
        """The name of a cluster that others may use too, the same for all of them; empty where it is this run's own."""
        return session() if self._shared else ""

    def leaving(self) -> frozenset[str]:
        """The nodes of which is known that they will be taken away."""
        return leaving()

    def groups(self) -> dict[str, int]:
        """How many machines of each node group there are, the head's aside."""
        return groups()

    def start(
        self,
        act: Callable[[Any], Any],
        task: Any,
        *,
        name: str,
        cpus: float,
        gpus: float,
        memory: float,
        labels: Mapping[str, str],
    ) -> Handle:
        """Have `act(task)` done in a process of its own, somewhere.

        Args:
            act: A function of a module.
            task: What it takes; is pickled.
            name: What Ray calls it.
            cpus: CPUs that are its own.
            gpus: GPUs that are its own; with some its process ends with it, because one that lives on keeps their
                memory.
            memory: Bytes that are its own; 0 asks for none.
            labels: What Ray's node has to be labelled with.
        """
        options: dict[str, Any] = {"name": name, "num_cpus": cpus, "num_gpus": gpus, "memory": memory or None}
        options["scheduling_strategy"] = "DEFAULT"  # a driver that has a place of its own would share that with it
        return _remote(fresh=gpus > 0).options(**options, label_selector=dict(labels)).remote(act, task)

    def heard(self, handles: Sequence[Handle], timeout: float) -> list[Began | Ended]:
        """What is new of some tasks, as soon as there is something, or nothing after `timeout` seconds.

        Raises:
            ClusterLost: Nothing will be heard of any of them.
        """
        import ray

        ready, _ = ray.wait(list(handles), num_returns=1, timeout=timeout)
        return [_said(handle) for handle in ready]

    def end(self, handle: Handle) -> None:
        """End a task's process, and with it all that it started; it is heard of as ended with an error."""
        import ray

        ray.cancel(handle, force=True)


@contextmanager
def opened(address: str = "local", most: Capacity | None = None) -> Iterator[Pool]:
    """The cluster at `address`, as `cluster.connect` opens it; `most` as of `Pool`.

    Raises:
        NoCluster: It does not answer.
    """
    with cluster(address):
        yield Pool(most, shared=address != "local")


def _said(handle: Handle) -> Began | Ended:
    """The next that a task says: first where it is, then its answer."""
    import ray

    try:
        kind, value = ray.get(next(handle))
    except ray.exceptions.LocalRayletDiedError as error:
        raise ClusterLost(str(error).strip().partition("\n")[0].rstrip(".")) from error
    except ray.exceptions.RayError as error:
        return Ended(handle, error=error)
    return Began(handle, *value) if kind == "began" else Ended(handle, value)


@functools.cache
def _remote(*, fresh: bool) -> Any:
    import ray

    return ray.remote(num_returns="streaming", max_retries=0, max_calls=1 if fresh else 0)(_told)


def _told(act: Callable[[Any], Any], task: Any) -> Generator[tuple[str, Any], None, None]:
    """`act(task)` in a task's process."""
    import ray

    here = ray.get_runtime_context()
    yield "began", (here.get_node_id(), here.get_node_labels().get(GROUP_LABEL, ""))
    yield "answer", act(task)
