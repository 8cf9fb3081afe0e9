"""What one step asks of the cluster."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from lfm.errors import FieldError
from lfm.method import FIELDS, STRATEGIES, Strategy

AUTO = "auto"
"""The strategy of a step for which the plan is to find one."""
KIND = "ray.io/accelerator-type"
"""The label of Ray that says of a node what its GPUs are."""


class ResourcesError(FieldError):
    """A request for resources that nothing could satisfy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one step asks of the cluster; it never changes the result beyond floating-point noise.

    Attributes:
        workers: Processes that share the work. With one, the step computes in its own task. Two numbers are the fewest
            and the most of a step that trains: it starts as soon as the fewest have room, goes on with more where
            there is more room, and with fewer where a machine is lost or another step waits.
        strategy: How those that train share a model: ``single`` is one process, ``ddp`` gives each a whole copy,
            ``zero1`` shares out the optimizer's moments, ``zero2`` also the gradients, ``zero3`` also the parameters;
            ``auto`` has the plan take the first of these that fits a machine.
        offload: Where a ``zero`` strategy keeps what does not compute: with the rest, or in the memory of the
            ``cpu``.
        cpus_per_worker: CPUs of each.
        gpus_per_worker: GPUs of each, a share of one allowed.
        accelerator: The kind of device: ``cpu``, ``gpu`` or a name that Ray knows (``H100``). It is part of
            the fingerprint.
        avoid: Kinds of GPU on whose machines no worker is put. Of a step that needs no GPU and names none these are
            all that there are, where the machines without could hold it.
        memory: Bytes of host memory of each worker; 0 asks for no particular amount.
        out_of_memory: What is changed when it ran out of memory, before it is tried once more: ``micro_batch`` halves
            the rows that a worker holds at once, at the same global batch; ``memory`` asks for twice as much;
            ``nothing`` does not try. None is ``micro_batch`` for what trains, else ``memory`` where it asks for some.
        timeout: Seconds of work after which an attempt is ended, with all processes that it started; 0 lets it go on.
        schedule_timeout: Seconds for which the step waits for machines that could hold it, where some were lost or
            have yet to come; it is given up then.
    """

    workers: int | tuple[int, ...] = 1
    strategy: Strategy | Literal["auto"] = "single"
    offload: Literal["none", "cpu"] = "none"
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    accelerator: str = "cpu"
    avoid: tuple[str, ...] = ()
    memory: int = 0
    out_of_memory: Literal["micro_batch", "memory", "nothing"] | None = None
    timeout: float = 0.0
    schedule_timeout: float = 600.0

    __pydantic_config__ = FIELDS  # a dataclass would take an annotation for a field

    def __post_init__(self) -> None:
        for holds, name, allowed in (
            (not isinstance(self.workers, int) or self.workers >= 1, "workers", "workers >= 1"),
            (isinstance(self.workers, int) or _ends(self.workers), "workers", "two numbers, 1 <= fewest <= most"),
            (self.strategy in (*STRATEGIES, AUTO), "strategy", f"one of {', '.join((*STRATEGIES, AUTO))}"),
            (
                self.offload == "none" or (self.offload == "cpu" and self.strategy.startswith("zero")),
                "offload",
                "'none', or 'cpu' with strategy zero1, zero2 or zero3",
            ),
            (self.cpus_per_worker > 0, "cpus_per_worker", "cpus_per_worker > 0"),
            (self.gpus_per_worker >= 0, "gpus_per_worker", "gpus_per_worker >= 0"),
            (
                not self.avoid or self.accelerator in ("cpu", "gpu"),
                "avoid",
                "none with an accelerator that is named",
            ),
            (self.memory >= 0, "memory", "bytes, memory >= 0"),
            (self.out_of_memory != "memory" or self.memory > 0, "out_of_memory", "'memory' only with memory > 0"),
            (self.timeout >= 0, "timeout", "seconds, timeout >= 0"),
            (self.schedule_timeout >= 0, "schedule_timeout", "seconds, schedule_timeout >= 0"),
            (
                (self.accelerator == "cpu") == (self.gpus_per_worker == 0),
                "accelerator",
                "'cpu' without GPUs, 'gpu' or a device's name with gpus_per_worker > 0",
            ),
        ):
            if not holds:
                raise ResourcesError("resources", name, getattr(self, name), allowed)

    @property
    def least(self) -> int:
        """The fewest workers: what has to have room before it starts, and for which each must be large enough."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """The most workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        """Whether their number may change while it works."""
        return self.least < self.most

    def among(self, workers: int) -> "Resources":
        """The same with a number of workers that stays."""
        return replace(self, workers=workers)

    @property
    def spoken(self) -> str:
        """The number of workers, or both ends of it, in words."""
        return f"{self.least} to {self.most}" if self.elastic else f"{self.least}"

    @property
    def grouped(self) -> bool:
        """Whether processes of their own do the work, instead of the step's."""
        return self.most > 1 or self.strategy != "single"

    @property
    def each(self) -> dict[str, Any]:
        """What one worker asks for, as a machine is asked how many it holds (`cluster.capacity.Node.holds`)."""
        return {
            "cpus": self.cpus_per_worker,
            "gpus": self.gpus_per_worker,
            "memory": self.memory,
            "accelerator": self.accelerator,
            "avoid": self.avoid,
        }

    @property
    def labels(self) -> dict[str, str]:
        """The labels in Ray that nodes of its workers must have: of machines that are still to come they are known."""
        if self.accelerator not in ("cpu", "gpu"):
            return {KIND: self.accelerator}
        return {KIND: f"!in({','.join(self.avoid)})"} if self.avoid else {}

    @property
    def device(self) -> str:
        """What torch calls what each worker computes on."""
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def cpus(self) -> float:
        """CPUs of the fewest workers together."""
        return self.least * self.cpus_per_worker

    @property
    def gpus(self) -> float:
        """GPUs of the fewest workers together."""
        return self.least * self.gpus_per_worker

    @property
    def all_memory(self) -> int:
        """Bytes of host memory that the fewest workers together ask for."""
        return self.least * self.memory


def _ends(workers: object) -> bool:
    """Whether these are the fewest and the most workers."""
    match workers:
        case (int(fewest), int(most)):
            return 1 <= fewest <= most
    return False
