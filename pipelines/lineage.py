"""Event -> journal; a run's journal -> what happened.

A run's journal is a series of segments, `runs/<run>/journal/<epoch>-<number>.json`, each written once. A driver
claims the next epoch before it writes; what an older epoch writes after that claim does not count.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import psutil

from lfm.errors import LfmError
from pipelines.storage import Storage
from pipelines.store import Result, Store, canonical


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


class UnknownArtifact(LfmError, LookupError):
    """A name that stands for no artifact."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name, self.known = name, known

    def __str__(self) -> str:
        return (
            f"{self.name!r} names no artifact, expected RUN/STEP, a step of the last run or the first letters "
            f"of a digest. Steps of that run that made something: {', '.join(self.known) or 'none'}."
        )


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
        self._started = Counter(e.step for e in history(storage, run) if e.kind == "start")

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

    def attempts(self, step: str) -> int:
        """How often the step was started, by this driver and those before."""
        return self._started[step]

    def write(self, events: Sequence[Event]) -> None:
        """Record events, in order, as one segment; they are on disk when this returns."""
        if events:
            self._segments += 1
            self._started.update(e.step for e in events if e.kind == "start")
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
    now = datetime.now(tz=UTC)  # with milliseconds, so that names sort as runs began
    return f"{now:%Y%m%d-%H%M%S}{now.microsecond // 1000:03}-{pipeline}-{os.urandom(2).hex()}"


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
    return "interrupted" if driver(storage, run) is None else "running"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ancestor:
    """One thing that an artifact came from.

    Attributes:
        depth: How many steps lie between it and what was asked for.
        made_by: The result that it is of; None for what came from outside.
    """

    depth: int
    role: str
    digest: str
    kind: str = ""
    uri: str = ""
    made_by: Result | None = None


def ancestry(store: Store, digest: str) -> list[Ancestor]:
    """An artifact and everything it came from, each followed by its own inputs; what is met again is not opened."""
    makers = {r.digest: r for r in results(store)}
    found: list[Ancestor] = []
    opened: set[str] = set()

    def walk(source: Mapping[str, Any], role: str, depth: int) -> None:
        maker = makers.get(source["digest"])
        found.append(Ancestor(depth=depth, role=role, made_by=maker, **source))
        if maker is None or source["digest"] in opened:
            return
        opened.add(source["digest"])
        for edge, filled in maker.inputs.items():
            for name, one in _named(edge, filled):
                walk(one, name, depth + 1)

    kind = makers[digest].kind if digest in makers else ""
    walk({"digest": digest, "kind": kind, "uri": ""}, "", 0)
    return found


def _named(edge: str, filled: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What fills an edge, each with a name: the edge's, or that and the place in it."""
    if isinstance(filled, list):
        yield from ((f"{edge}[{i}]", one) for i, one in enumerate(filled))
    elif "digest" in filled and isinstance(filled["digest"], str):
        yield edge, filled
    else:
        yield from ((f"{edge}.{name}", one) for name, one in filled.items())


def results(store: Store) -> Iterator[Result]:
    """Every result in the store."""
    for key in store.storage.list("results"):
        found = store.result(key.removeprefix("results/").removesuffix(".json"))
        if found is not None:
            yield found


def find_artifact(store: Store, name: str) -> str:
    """The digest that `name` means: ``RUN/STEP``, a ``STEP`` of the last run, or how a digest begins.

    Raises:
        UnknownArtifact: None, or more than one.
        UnknownRun: No such run.
    """
    run, slash, step = name.rpartition("/")
    known = runs(store.storage)
    if slash or known:
        made = {e.step: e.data["digest"] for e in history(store.storage, find_run(store.storage, run or "last"))
                if e.kind in ("commit", "reuse")}  # fmt: skip
        if step in made:
            return str(made[step])
        if slash:
            raise UnknownArtifact(name, tuple(made))
    found = {k.split("/")[1] for k in store.storage.list("artifacts") if k.split("/")[1].startswith(name)}
    if len(name) < 6 or len(found) != 1:
        raise UnknownArtifact(name, tuple(made) if known else ())
    return found.pop()


def driver(storage: Storage, run: str) -> int | None:
    """The process on this machine that drives the run, if one does."""
    claims = storage.list(f"runs/{run}/claims")
    claim = json.loads(storage.read(claims[-1]) or b"{}") if claims else {}
    return int(claim["pid"]) if _alive(claim) else None


def _alive(claim: Mapping[str, Any]) -> bool:
    """Whether the process that made a claim lives; on another machine nobody can tell, so it counts as dead."""
    if claim.get("host") != socket.gethostname() or claim.get("pid") == os.getpid():
        return False
    try:
        return bool(abs(psutil.Process(claim["pid"]).create_time() - float(claim["born"])) < 1.0)
    except (psutil.Error, KeyError):
        return False
