"""Event -> journal; a run's journal -> what happened.

A run's journal is a series of segments, `runs/<run>/journal/<epoch>-<number>.json`, each written once. A driver
claims the next epoch before it writes; what an older epoch writes after that claim does not count.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import psutil

from lfm.errors import LfmError
from pipelines.store import canonical
from pipelines.storage import Storage


class UnknownRun(LfmError, LookupError):
    """A run that the store does not have."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name, self.known = name, known

    def __str__(self) -> str:
        shown = ", ".join(self.known[-5:]) or "none"
        return f"No run is called {self.name!r}. The last ones: {shown}."


class RunIsLive(LfmError, RuntimeError):
    """Another driver is working on the run."""

    def __init__(self, run: str, host: str, pid: int) -> None:
        super().__init__(run, host, pid)
        self.run, self.host, self.pid = run, host, pid

    def __str__(self) -> str:
        return f"Run {self.run!r} is driven by process {self.pid} on {self.host}. Wait for it or stop it first."


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run.

    Attributes:
        kind: ``started`` and ``finished`` (the run); ``start``, ``reuse``, ``commit``, ``fail`` (a step).
        time: Seconds since 1970.
    """

    kind: str
    step: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = 0.0


class Journal:
    """What one driver writes about one run."""

    def __init__(self, storage: Storage, run: str, epoch: int) -> None:
        self.storage, self.run, self.epoch = storage, run, epoch
        self._segments = 0

    @classmethod
    def claim(cls, storage: Storage, run: str) -> "Journal":
        """Become the run's driver.

        Raises:
            RunIsLive: The process that claimed it last is alive on this machine, or claimed it just now.
        """
        claims = storage.list(f"runs/{run}/claims")
        if claims:
            last = json.loads(storage.read(claims[-1]) or b"{}")
            if _alive(last):
                raise RunIsLive(run, last["host"], last["pid"])
        epoch = len(claims) + 1
        process = psutil.Process()
        claim = {"host": socket.gethostname(), "pid": process.pid, "born": process.create_time()}
        if not storage.put_if_absent(f"runs/{run}/claims/{epoch:06}.json", canonical(claim)):
            raise RunIsLive(run, "another claim", 0)
        return cls(storage, run, epoch)

    def write(self, events: Sequence[Event]) -> None:
        """Record events, in order, as one segment; they are on disk when this returns."""
        if events:
            self._segments += 1
            key = f"runs/{self.run}/journal/{self.epoch:06}-{self._segments:06}.json"
            self.storage.put_if_absent(key, canonical([asdict(e) for e in events]))


def history(storage: Storage, run: str) -> list[Event]:
    """All events of a run, in order."""
    events: list[Event] = []
    for key in storage.list(f"runs/{run}/journal"):
        events += [Event(**e) for e in json.loads(storage.read(key) or b"[]")]
    return events


def runs(storage: Storage) -> tuple[str, ...]:
    """The names of all runs, oldest first."""
    first = [k for k in storage.list("runs") if k.endswith("/journal/000001-000001.json")]
    return tuple(k.split("/")[1] for k in first)


def find_run(storage: Storage, name: str) -> str:
    """The run that `name` means: its name, a part that only it has, or ``last``.

    Raises:
        UnknownRun: None, or more than one.
    """
    known = runs(storage)
    if name == "last" and known:
        return known[-1]
    found = [r for r in known if name in r]
    if name in known or len(found) == 1:
        return name if name in known else found[0]
    raise UnknownRun(name, known)


def new_run(pipeline: str) -> str:
    """A name for a run: when it began, what it runs, and a few letters that no other has."""
    stamp = datetime.fromtimestamp(time.time(), tz=timezone.utc).strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{pipeline}-{os.urandom(2).hex()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepState:
    """What became of a step."""

    state: str = "waiting"
    attempts: int = 0
    began: float = 0.0
    ended: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)


STATES = {"start": "running", "reuse": "reused", "commit": "done", "fail": "failed"}


def states(events: Iterable[Event], steps: Iterable[str]) -> dict[str, StepState]:
    """Each step's state after `events`."""
    found = {s: StepState() for s in steps}
    for event in events:
        old = found.get(event.step)
        if old is not None and event.kind in STATES:
            found[event.step] = StepState(
                state=STATES[event.kind],
                attempts=old.attempts + (event.kind == "start"),
                began=event.time if event.kind in ("start", "reuse") else old.began,
                ended=event.time if event.kind != "start" else 0.0,
                data={**old.data, **event.data},
            )
    return found


def status(storage: Storage, run: str, events: Sequence[Event]) -> str:
    """``running``, ``done``, ``failed`` or ``interrupted``."""
    last = [e for e in events if e.kind in ("started", "finished")][-1:]
    if last and last[0].kind == "finished":
        return str(last[0].data["status"])
    claims = storage.list(f"runs/{run}/claims")
    return "running" if claims and _alive(json.loads(storage.read(claims[-1]) or b"{}")) else "interrupted"


def _alive(claim: Mapping[str, Any]) -> bool:
    """Whether the process that made a claim lives; on another machine nobody can tell, so it counts as dead."""
    if claim.get("host") != socket.gethostname() or claim.get("pid") == os.getpid():
        return False
    try:
        return abs(psutil.Process(claim["pid"]).create_time() - float(claim["born"])) < 1.0
    except (psutil.Error, KeyError):
        return False
