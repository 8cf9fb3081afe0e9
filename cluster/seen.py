"""What is seen of a cluster that runs: its nodes, the jobs on it, and what they have cost so far."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm.errors import LfmError

LOOK_S = 60.0  # how long a head may take to answer


class NoAnswer(LfmError, ConnectionError):
    """A head that does not answer."""

    def __init__(self, address: str, said: str) -> None:
        super().__init__(address, said)
        self.address, self.said = address, said

    def __str__(self) -> str:
        return (
            f"Ray at {self.address!r}: no answer ({self.said}), expected a head that lives, and its token. "
            "Check the profile."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenNode:
    """One node, dead ones too.

    Attributes:
        group: The head's is ``head``; empty where its labels say nothing.
        began: Seconds since 1970.
        ended: The same; 0 while it lives.
        idle_s: For how many seconds nobody has used it; 0 while somebody does.
    """

    id: str
    name: str
    group: str
    market: str
    alive: bool
    began: float
    ended: float
    cpus: float
    gpus: float
    idle_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenJob:
    """One job or driver; `does` is what was started."""

    id: str
    does: str
    began: float
    running: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A cluster at one time, by the clock of its head."""

    time: float
    nodes: tuple[SeenNode, ...]
    jobs: tuple[SeenJob, ...]

    @property
    def running(self) -> tuple[SeenJob, ...]:
        """The jobs that run."""
        return tuple(j for j in self.jobs if j.running)

    @property
    def idle_s(self) -> float:
        """For how many seconds nobody has used it: no job runs, and no node does anything."""
        return 0.0 if self.running else min((n.idle_s for n in self.nodes if n.alive), default=0.0)

    def hours(self) -> dict[str, float]:
        """Node-hours so far, by group."""
        found: dict[str, float] = {}
        for node in self.nodes:
            until = self.time if node.alive else node.ended
            found[node.group] = found.get(node.group, 0.0) + max(0.0, until - node.began) / 3600
        return found


def look(address: str, environment: Mapping[str, str]) -> Seen:
    """Look at a cluster from this machine, with the token that an environment holds.

    Raises:
        NoAnswer: Its head does not answer.
    """
    words = [sys.executable, "-m", "cluster.look", address]
    root = Path(__file__).resolve().parent.parent
    try:
        asked = subprocess.run(words, env=dict(environment), cwd=root, capture_output=True, text=True, timeout=LOOK_S)
    except subprocess.TimeoutExpired:
        raise NoAnswer(address, f"nothing for {LOOK_S:.0f} s") from None
    if asked.returncode:
        raise NoAnswer(address, asked.stderr.strip().rpartition("\n")[2])
    return seen(json.loads(asked.stdout))


def seen(said: Mapping[str, Any]) -> Seen:
    """What `cluster.look` has printed."""
    return Seen(
        time=said["time"],
        nodes=tuple(SeenNode(**n) for n in said["nodes"]),
        jobs=tuple(SeenJob(**j) for j in said["jobs"]),
    )
