"""What there is to run on: this machine's share of CPUs, GPUs and memory, read without Ray or torch."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a cluster has in all; `memory` in bytes."""

    cpus: float
    gpus: float
    memory: float = float("inf")


def here() -> Capacity:
    """What this process may use of this machine: its CPU affinity, its visible GPUs, its control group's limits."""
    return Capacity(cpus=_cpus(), gpus=_gpus(), memory=_memory())


def _cpus() -> float:
    allowed = float(len(os.sched_getaffinity(0)))
    quota, _, period = _limit("cpu.max", "max 1").partition(" ")
    if quota == "max":
        return allowed
    return max(1.0, min(allowed, float(int(quota) // int(period))))


def _gpus() -> float:
    driver = Path("/proc/driver/nvidia/gpus")
    present = len(list(driver.iterdir())) if driver.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return float(present)
    return float(min(present, len([v for v in visible.split(",") if v.strip() not in ("", "-1")])))


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
