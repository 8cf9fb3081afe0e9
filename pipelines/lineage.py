"""Event -> journal; a run's journal -> what happened.

A run's journal is a series of segments, `runs/<run>/journal/<epoch>-<number>.json`, each written once. A driver
claims the next epoch before it writes; what an older epoch writes after that claim does not count.

Packs, `runs/<run>/packs/<epoch>-<number>.json`, spare readers a request for each segment. A pack holds segments by
their names, and where one is named after a segment, every segment up to that one that counts is in it or in an
earlier one. The segments stay: what a pack holds beside what counts, or what another holds too, does no harm.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from cluster import processes
from cluster.processes import BEAT_S, LEASE_S
from lfm.errors import LfmError
from pipelines.faults import reached
from pipelines.storage.base import Storage, StorageFailed, at_once
from pipelines.store import canonical

TRIAL = "~"  # parts the name of a trial's run; no pipeline and no step has it in its own
TRIAL_NAMED = 12  # letters of a digest of its changes
PACKED = 128  # so many segments without a pack at most: what a reader of a long journal has to ask for one by one


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


class RunTaken(LfmError, RuntimeError):
    """A driver that another one has taken for dead."""

    def __init__(self, run: str, host: str, pid: int) -> None:
        super().__init__(run, host, pid)
        self.run, self.host, self.pid = run, host, pid

    def __str__(self) -> str:
        return (
            f"Run {self.run!r}: process {self.pid} on {self.host} drives it now, expected this one, which was silent "
            "for too long. What this one does any more does not count; follow the other one with lfm show."
        )


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run.

    Attributes:
        kind: ``started``, ``serving`` and ``finished`` (the run); ``nodes`` (how many machines of each group there are
            from now on); ``wait`` (a step, for what ``why`` says: a larger cluster, another run's result, its turn),
            ``start``, ``workers`` (how many share its work from now on), ``reuse``, ``commit`` and ``fail`` (a step);
            ``heard``, which no journal has (`pipelines.view.heard`).
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
        self._beats, self._due = 0, time.monotonic() + BEAT_S
        found, self._loose = _read(storage, run)
        self._started = Counter(e.step for e in _events(found) if e.kind == "start")

    @classmethod
    def claim(cls, storage: Storage, run: str, *, waiting: Callable[[str], None] = lambda said: None) -> "Journal":
        """Become the run's driver.

        Args:
            storage: Where the run is.
            run: Its name.
            waiting: Called with a sentence where it takes a while: until the driver before, which is of another
                machine and has not written down its end, has said nothing for `LEASE_S`.

        Raises:
            RunIsLive: The process that claimed it last is alive, or claimed it just now.
        """
        claims = storage.list(f"runs/{run}/claims")
        if claims:
            _see_it_dead(storage, run, claims[-1], waiting)
        before = len(claims)
        # Clocks of two machines tell no order, so the claim says how much of what came before it counts: up to which
        # segment, and not how many, because a driver that was interrupted while it wrote one has gone on after it.
        packs, loose = written(storage, run)
        counts = max((_segment(k) for k in (*packs, *loose) if _epoch(k) == before), default=0)
        claim = canonical({**processes.this(), "counts": counts})
        reached("claim: decided")
        if not storage.put_if_absent(_claim(run, before + 1), claim):
            raise RunIsLive(run, "another claim", 0)
        reached("claim: written")
        claimed = cls(storage, run, before + 1)
        claimed._pack()
        return claimed

    def beat(self) -> bool:
        """Say that this driver lives; cheap, call it often.

        Returns:
            Whether it was time to.

        Raises:
            RunTaken: Another one has claimed the run since.
        """
        if time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + BEAT_S
        self._beats += 1
        taken = self.storage.read(_claim(self.run, self.epoch + 1))
        if taken is not None:
            by = json.loads(taken)
            raise RunTaken(self.run, by["host"], by["pid"])
        key = _claim(self.run, self.epoch)
        old = self.storage.read(key) or b"{}"
        self.storage.replace_if_match(key, canonical({**json.loads(old), "beats": self._beats}), old)
        return True

    def attempts(self, step: str) -> int:
        """How often the step was started, by this driver and those before."""
        return self._started[step]

    def write(self, events: Sequence[Event]) -> None:
        """Record events, in order, as one segment; they are on disk when this returns."""
        if events:
            self._segments += 1
            self._started.update(e.step for e in events if e.kind == "start")
            name = f"{self.epoch:06}-{self._segments:06}.json"
            # Not canonical, which would sort: the plan's order of steps and an evaluation's of sets mean something.
            said = [{f: getattr(e, f) for f in Event.__slots__} for e in events]  # `asdict` would copy a whole plan
            data = json.dumps(said, separators=(",", ":")).encode()
            self._loose[name] = data
            for event in events:
                reached(f"journal: before {event.kind}")
            self.storage.put_if_absent(f"runs/{self.run}/journal/{name}", data)
            for event in events:
                reached(f"journal: after {event.kind}")
            if len(self._loose) >= PACKED or events[-1].kind == "finished":
                self._pack()

    def _pack(self) -> None:
        """Write what no pack holds as one; what a write that broke off was to say is in it, as it may have landed.

        Packs only save readers requests, so one that storage refuses is left for the next time.
        """
        if self._loose:
            reached("pack: before it")
            held = b",".join(b'"%s":%s' % (name.encode(), data) for name, data in self._loose.items())
            with suppress(StorageFailed):
                self.storage.put_if_absent(f"runs/{self.run}/packs/{max(self._loose)}", b"{%s}" % held)
                reached("pack: is in")
                self._loose = {}


def _claim(run: str, epoch: int) -> str:
    """The key of what a driver says of itself."""
    return f"runs/{run}/claims/{epoch:06}.json"


def _see_it_dead(storage: Storage, run: str, key: str, waiting: Callable[[str], None]) -> None:
    """Raise `RunIsLive` unless the driver that made a claim is dead, or silent for as long as that takes."""
    said = storage.read(key) or b"{}"
    claim = json.loads(said)
    live = RunIsLive(run, claim.get("host", ""), claim.get("pid", 0))
    if _drives(claim):
        raise live
    if processes.alive(claim) is not None or [e.kind for e in history(storage, run)][-1:] == ["finished"]:
        return
    waiting(f"Run {run!r}: its driver is on {live.host}; seeing for {LEASE_S:.0f} s whether it lives.")
    until = time.monotonic() + LEASE_S
    while time.monotonic() < until:
        time.sleep(min(1.0, LEASE_S))
        if storage.read(key) != said:
            raise live


def history(storage: Storage, run: str) -> list[Event]:
    """All events of a run, in order; what a driver wrote after the next one's claim is left out."""
    return _events(_read(storage, run)[0])


def _events(found: Mapping[str, Sequence[Any]]) -> list[Event]:
    return [Event(**e) for name in sorted(found) for e in found[name]]


def _read(storage: Storage, run: str) -> tuple[dict[str, Sequence[Any]], dict[str, bytes]]:
    """What each segment that counts says, by its name; and the bytes of those that no pack holds."""
    packs, loose = written(storage, run)
    claims = storage.list(f"runs/{run}/claims")[1:]  # after the segments: none of them is later than a claim unseen
    keys = (*packs, *loose, *claims)
    read = {k: data for k, data in zip(keys, at_once(storage.read, keys), strict=True) if data is not None}
    counts = {epoch: json.loads(read.get(k, b'{"counts":0}'))["counts"] for epoch, k in enumerate(claims, 1)}
    data = {_name(k): read[k] for k in loose if k in read}
    said = {name: says for k in packs for name, says in json.loads(read.get(k, b"{}")).items()}
    said |= {name: json.loads(one) for name, one in data.items()}
    counted = {n: says for n, says in said.items() if _segment(n) <= counts.get(_epoch(n), _segment(n))}
    return counted, {n: one for n, one in data.items() if n in counted}


def written(storage: Storage, run: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of a run's packs, and of the segments after the last of them: all of its journal."""
    packs = storage.list(f"runs/{run}/packs")
    return packs, storage.list(f"runs/{run}/journal", after=f"runs/{run}/journal/{_name(packs[-1])}" if packs else "")


def _name(key: str) -> str:
    """A segment's name, which its key ends with, and that of a pack with everything up to it."""
    return key.rpartition("/")[2]


def _epoch(segment: str) -> int:
    """Which driver wrote a segment, counted from 1."""
    return int(_name(segment).partition("-")[0])


def _segment(segment: str) -> int:
    """Its place in what that driver wrote, counted from 1."""
    return int(segment.rpartition("-")[2].removesuffix(".json"))


def trial_name(run: str, step: str, changes: Mapping[str, Any]) -> str:
    """The run of a trial: it says which step of which run began it, and differs where the changes do."""
    return TRIAL.join((run, step, hashlib.sha256(canonical(changes)).hexdigest()[:TRIAL_NAMED]))


def trials(storage: Storage, run: str, step: str = "") -> list[str]:
    """The trials of one step of a run; without one of all, and what is below these."""
    start = f"{run}{TRIAL}{step}{TRIAL}" if step else f"{run}{TRIAL}"
    found = [r for r in storage.folders("runs") if r.startswith(start)]
    return [r for r in found if TRIAL not in r.removeprefix(start)] if step else found


def runs(storage: Storage) -> tuple[str, ...]:
    """The names of all runs, oldest first, without those that are trials of others."""
    names = [r for r in storage.folders("runs") if TRIAL not in r]
    return tuple(n for n, has in zip(names, at_once(partial(begun, storage), names), strict=True) if has)


def begun(storage: Storage, run: str) -> bool:
    """Whether a run's first driver lived to write something."""
    return storage.read(f"runs/{run}/journal/000001-000001.json") is not None


def find_run(storage: Storage, name: str) -> str:
    """The run that `name` means: its name, a part that only it has, or ``last``.

    Raises:
        UnknownRun: None, or more than one.
    """
    names = storage.folders("runs")
    if name == "last":
        newest = next((r for r in reversed(names) if TRIAL not in r and begun(storage, r)), None)
        found = [] if newest is None else [newest]
    else:
        found = [r for r in names if name in r and (TRIAL not in r or TRIAL in name) and begun(storage, r)]
    if name in found or len(found) == 1:
        return name if name in found else found[0]
    raise UnknownRun(name, runs(storage))


def new_run(pipeline: str) -> str:
    """A name for a run: when it began, what it runs, and a few letters that no other has."""
    now = datetime.now(tz=UTC)  # with milliseconds, so that names sort as runs began
    return f"{now:%Y%m%d-%H%M%S}{now.microsecond // 1000:03}-{pipeline}-{os.urandom(4).hex()}"


def by_driver(events: Iterable[Event]) -> list[list[Event]]:
    """The events of each driver: a ``started`` event and what follows."""
    drivers: list[list[Event]] = []
    for event in events:
        if event.kind == "started":
            drivers.append([])
        drivers[-1].append(event)
    return drivers


def sessions(events: Iterable[Event], now: float = 0.0) -> list[tuple[float, float]]:
    """When each driver began and ended working: the time that endpoints were up after that is no work.

    Args:
        events: Of one run.
        now: The time, where the run's driver lives.
    """
    return [
        (own[0].time, next((e.time for e in own if e.kind == "serving"), ended)) for own, ended in _lives(events, now)
    ]


def worked(events: Iterable[Event], now: float = 0.0) -> float:
    """Seconds in which drivers worked; the arguments are those of `sessions`."""
    return sum(ended - began for began, ended in sessions(events, now))


def served(events: Iterable[Event], now: float = 0.0) -> float:
    """Seconds for which endpoints were up after the work was done; the arguments are those of `sessions`."""
    return sum(ended - e.time for own, ended in _lives(events, now) for e in own if e.kind == "serving")


def _lives(events: Iterable[Event], now: float) -> list[tuple[list[Event], float]]:
    """The events of each driver, and when it was heard of last."""
    drivers = by_driver(events)
    return [(own, now if now and own is drivers[-1] else own[-1].time) for own in drivers]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepState:
    """What became of a step.

    Attributes:
        state: ``waiting``, ``running``, ``done``, ``reused``, ``failed``, or ``interrupted``: its driver ended first.
        attempts: How often it was started.
        began: When its last attempt began, or when it was reused.
        ended: When that ended; of one that was interrupted, when its driver was heard of last.
        data: What the events noted.
    """

    state: str = "waiting"
    attempts: int = 0
    began: float = 0.0
    ended: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)


STATES = {"start": "running", "reuse": "reused", "commit": "done", "fail": "failed"}


class Standing:
    """Each step's state, kept up with the events of a run.

    Attributes:
        steps: The states, by step.
    """

    def __init__(self, steps: Iterable[str]) -> None:
        self.steps = {s: StepState() for s in steps}
        self._heard = 0.0  # when the last event was

    def add(self, event: Event) -> None:
        """Take an event in."""
        old = self.steps.get(event.step)
        if event.kind in ("started", "finished"):  # whatever still ran ended with its driver
            self.interrupt(event.time if event.kind == "finished" else self._heard)
        elif old is None:
            pass
        elif event.kind in ("wait", "workers") or (event.kind, old.state) == ("reuse", "done"):  # by an earlier driver
            self.steps[event.step] = replace(old, data={**old.data, **event.data})
        elif event.kind in STATES:
            self.steps[event.step] = StepState(
                state=STATES[event.kind],
                attempts=old.attempts + (event.kind == "start"),
                began=event.time if event.kind in ("start", "reuse") else old.began,
                ended=event.time if event.kind != "start" else 0.0,
                data={**old.data, **event.data},
            )
        self._heard = event.time

    def interrupt(self, ended: float | None = None) -> None:
        """Nobody drives the run any more, since then or since it was heard of last: what still ran is interrupted."""
        at = self._heard if ended is None else ended
        self.steps = {
            n: replace(s, state="interrupted", ended=at) if s.state == "running" else s for n, s in self.steps.items()
        }


def states(events: Iterable[Event], steps: Iterable[str], *, live: bool = True) -> dict[str, StepState]:
    """Each step's state after `events`; what still runs after them was interrupted where no driver lives."""
    found = Standing(steps)
    for event in events:
        found.add(event)
    if not live:
        found.interrupt()
    return found.steps


def status(storage: Storage, run: str, events: Sequence[Event]) -> str:
    """``running``, ``serving``, ``done``, ``failed`` or ``interrupted``; of a trial also ``stopped``."""
    last = [e for e in events if e.kind in ("started", "serving", "finished")][-1]
    if last.kind == "finished":
        return str(last.data["status"])
    going_on = lives(storage, run)
    if last.kind == "serving":  # all its steps are done
        return "serving" if going_on else "done"
    return "running" if going_on else "interrupted"


def driver(storage: Storage, run: str) -> int | None:
    """The process on this machine that drives the run, if one does."""
    claim = _last_claim(storage, run)
    return int(claim["pid"]) if _drives(claim) else None


def lives(storage: Storage, run: str) -> bool:
    """Whether a driver of this machine lives, or one of another has said so lately.

    The second compares the clock of the storage with this machine's: only what is shown may depend on it.
    """
    claim = _last_claim(storage, run)
    if processes.alive(claim) is not None:
        return _drives(claim)
    beats = [e.modified for e in storage.entries(f"runs/{run}/claims")]
    return bool(beats) and time.time() - max(beats) < LEASE_S


def _last_claim(storage: Storage, run: str) -> dict[str, Any]:
    claims = storage.list(f"runs/{run}/claims")
    found: dict[str, Any] = json.loads(storage.read(claims[-1]) or b"{}") if claims else {}
    return found


def _drives(claim: Mapping[str, Any]) -> bool:
    """Whether another process of this machine made a claim and lives."""
    return claim.get("pid") != os.getpid() and bool(processes.alive(claim))
