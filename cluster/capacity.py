"""What there is to run on: this machine's share of CPUs, GPUs and memory, read without Ray or torch."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROUNDING = 1e-9
"""A machine with one CPU holds ten workers with a tenth each, although floats disagree; Ray counts in 1/10000."""
DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What one machine of a cluster has; `memory` in bytes, `accelerators` as Ray calls them, and its node group."""

    cpus: float
    gpus: float = 0.0
    memory: float = float("inf")
    accelerators: frozenset[str] = frozenset()
    group: str = ""

    def holds(
        self,
        *,
        cpus: float,
        gpus: float = 0.0,
        memory: float = 0.0,
        accelerator: str = "cpu",
        avoid: Iterable[str] = (),
    ) -> int:
        """How many workers the empty machine could hold that each ask for so much, as Ray counts it.

        Args:
            cpus: CPUs of each, cpus > 0.
            gpus: GPUs of each: whole ones, or a share of one, which is never of two.
            memory: Bytes of each.
            accelerator: The kind of GPU; ``cpu`` and ``gpu`` take any.
            avoid: Kinds of GPU on whose machines none of them is put.
        """
        if accelerator not in ("cpu", "gpu", *self.accelerators) or not self.accelerators.isdisjoint(avoid):
            return 0
        times = [self.cpus / cpus]
        if gpus:
            times.append(self.gpus / gpus if gpus >= 1 else self.gpus * math.floor(1 / gpus + ROUNDING))
        if memory:
            times.append(self.memory / memory)
        return math.floor(min(times) + ROUNDING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a cluster has in all.

    Attributes:
        memory: In bytes.
        accelerators: As Ray calls them; None where nobody has looked.
        nodes: What each machine has; empty where nobody has looked, or where it does not matter.
    """

    cpus: float
    gpus: float
    memory: float = float("inf")
    accelerators: frozenset[str] | None = None
    nodes: tuple[Node, ...] = ()

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> "Capacity":
        """All that some machines have."""
        found = tuple(nodes)
        return cls(
            cpus=sum(n.cpus for n in found),
            gpus=sum(n.gpus for n in found),
            memory=sum(n.memory for n in found),
            accelerators=frozenset().union(*(n.accelerators for n in found)),
            nodes=found,
        )

    @property
    def machines(self) -> tuple[Node, ...]:
        """Each machine; where nobody has looked, all that there is as if it were one."""
        kinds = self.accelerators or frozenset()
        return self.nodes or (Node(cpus=self.cpus, gpus=self.gpus, memory=self.memory, accelerators=kinds),)


def here() -> Capacity:
    """What this process may use of this machine: its CPU affinity, its visible GPUs, its control group's limits."""
    return Capacity(cpus=_cpus(), gpus=_gpus(), memory=_memory(), accelerators=_accelerators())


def _cpus() -> float:
    allowed = float(len(os.sched_getaffinity(0)))
    quota, _, period = _limit("cpu.max", "max 1").partition(" ")
    if quota == "max":
        return allowed
    return max(1.0, min(allowed, float(int(quota) // int(period))))


def _gpus() -> float:
    present = len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return float(present)
    return float(min(present, len([v for v in visible.split(",") if v.strip() not in ("", "-1")])))


def _accelerators() -> frozenset[str]:
    models = [re.search(r"^Model:\s*(.+)$", f.read_text(), re.MULTILINE) for f in DRIVER.glob("*/information")]
    return frozenset(accelerator(m[1].strip()) for m in models if m is not None)


def accelerator(model: str) -> str:
    """What Ray calls a device, given what its driver calls it: ``H100`` for ``NVIDIA H100 80GB HBM3``."""
    _, *words = model.split()
    series: list[str] = []
    for word in words:
        series.append(word.partition("-")[0])
        if not re.fullmatch(r"[A-Z0-9]+", series[-1]):
            break
        if re.search(r"\d", series[-1]):
            return "-".join(series)
    return "-".join(model.removeprefix("NVIDIA ").split())


def _memory() -> float:
    total = float(psutil.virtual_memory().total)
    limit = _limit("memory.max", "max")
    return total if limit == "max" else min(total, float(limit))


def _limit(name: str, otherwise: str) -> str:
    """A limit of this process's control group (version 2)."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return otherwise
