"""Store -> everything that the page says of a run, read once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.ancestry import Ancestor, ancestry, recorded
from pipelines.history import used
from pipelines.lineage import Event, by_driver, history, served, sessions, status
from pipelines.storage.base import at_once
from pipelines.store import Store
from pipelines.usage import Span, Usage, foreseen, spans
from pipelines.view import heard, measured

ENDS = {"commit": "done", "fail": "failed"}

Lines = Sequence[Mapping[str, Any]]
"""What an attempt reported: ``done``, ``total``, ``time`` and perhaps ``measures``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a step.

    Attributes:
        state: ``done``, ``failed``, ``running`` or ``interrupted``.
        ended: When it ended, or gave its last sign of life.
        log: The key of what it printed; empty where it never had a process.
        said: What the event of its end noted.
        groups: How many workers shared its work, one after the other, and why.
    """

    number: int
    state: str
    began: float
    ended: float
    log: str
    lines: Lines
    said: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A planned step and what became of it.

    Attributes:
        planned: What the journal says of it: operator, method, params, inputs, resources, fingerprint.
        state: That of its last attempt, or ``reused``, ``waiting`` or ``skipped``.
        made: What it noted about what it made, or what was reused: digest, artifact, about.
        lines: What its last attempt measured, or the one that made what was reused.
        waits: What it has waited for besides steps of its run, in that order.
    """

    name: str
    planned: Mapping[str, Any]
    state: str
    attempts: tuple[Attempt, ...]
    made: Mapping[str, Any]
    lines: Lines
    waits: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The steps that it takes something from."""
        return tuple(self.planned["needs"])

    @property
    def verb(self) -> str:
        """Its operator, and the method by which it is done."""
        method = self.planned["method"]
        return f"{self.planned['operator']} · {method['name']}" if method else str(self.planned["operator"])

    @property
    def about(self) -> Mapping[str, Any]:
        """What was noted about its artifact."""
        about: Mapping[str, Any] = self.made.get("about", {})
        return about

    @property
    def seconds(self) -> float:
        """How long its last attempt took, or took so far; 0 where it had none."""
        return self.attempts[-1].ended - self.attempts[-1].began if self.attempts else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """A run.

    Attributes:
        started: The data of its last ``started`` event.
        sessions: When each of its drivers began and ended working: more than one where it was resumed.
        served: Seconds for which its endpoints were up after the work was done.
        now: When the page was made, where that shows: in a run that goes on. Else 0.
        steps: By name, in an order in which they could run.
        ancestors: What the last artifact came from.
        machines: How many there were from when to when; nothing where nobody has counted them.
        usage: What it took of these; None where nobody knows what machines there were.
        foreseen: What its plan foresaw, as `pipelines.usage.foreseen` has it.
    """

    run: str
    store: str
    status: str
    started: Mapping[str, Any]
    sessions: tuple[tuple[float, float], ...]
    served: float
    now: float
    steps: Mapping[str, Step]
    ancestors: Sequence[Ancestor]
    machines: Sequence[Span] = ()
    usage: Usage | None = None
    foreseen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> Mapping[str, Mapping[str, str]]:
        """What comes from outside: kind, uri and digest by name."""
        inputs: Mapping[str, Mapping[str, str]] = self.started["inputs"]
        return inputs


def account(store: Store, run: str, *, now: float) -> Account:
    """Read a run's journal, its measures, and what its last artifact came from."""
    events = heard(store.storage, history(store.storage, run))
    said = status(store.storage, run, events)
    until = now if said in ("running", "serving") else 0.0
    drivers = by_driver(events)
    started = drivers[-1][0].data
    logs = [e.data["log"] for e in events if e.kind == "start"]
    reports = dict(zip(logs, at_once(lambda log: measured(store.storage, log), logs), strict=True))
    planned = in_order(started["steps"])
    attempts = {n: _attempts(n, drivers, reports, now if said == "running" else 0.0) for n in planned}
    known = at_once(lambda n: _step(n, planned[n], attempts[n], drivers, store, said), planned)
    steps = {s.name: s for s in known}
    last = next((s for s in reversed(steps.values()) if s.made), None)
    return Account(
        run=run,
        store=store.storage.uri,
        status=said,
        started=started,
        sessions=tuple(sessions(events, until)),
        served=served(events, until),
        now=until,
        steps=steps,
        ancestors=_ancestors(store, run, last) if last is not None else (),
        machines=tuple(span for own in drivers for span in spans(own, until if own is drivers[-1] else 0.0)),
        usage=used(store.storage, run, events, until),
        foreseen=foreseen(events),
    )


def in_order(steps: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Each step after those that it needs, else as they come."""
    left, ordered = dict(steps), dict[str, Mapping[str, Any]]()
    while left:
        name = next(n for n, s in left.items() if not any(needed in left for needed in s["needs"]))
        ordered[name] = left.pop(name)
    return ordered


def _ancestors(store: Store, run: str, step: Step) -> list[Ancestor]:
    return ancestry(store, step.made["digest"], recorded(store.storage, run)[step.name])


def _attempts(
    step: str, drivers: Sequence[Sequence[Event]], reports: Mapping[str, Lines], now: float
) -> tuple[Attempt, ...]:
    """A step's attempts; one without an end runs if its driver is the last one and `now` is given."""
    found = []
    for driver in drivers:
        own = [e for e in driver if e.step == step]
        ends = [e for e in own if e.kind in ENDS]
        for start in (e for e in own if e.kind == "start"):
            end = next((e for e in ends if e.data["attempt"] == start.data["attempt"]), None)
            if end is not None:
                state, ended = ENDS[end.kind], end.time
            elif now and driver is drivers[-1]:
                state, ended = "running", now
            else:
                state, ended = "interrupted", driver[-1].time
            attempt = Attempt(
                number=start.data["attempt"],
                state=state,
                began=start.time,
                ended=ended,
                log=start.data["log"],
                lines=reports[start.data["log"]],
                said=end.data if end is not None else {},
                groups=[e.data for e in own if e.kind == "workers" and e.data["attempt"] == start.data["attempt"]],
            )
            found.append(attempt)
        found += [_refusal(e) for e in ends if e.kind == "fail" and not e.data["log"]]
    return tuple(found)


def _refusal(event: Event) -> Attempt:
    """What stands for the attempt that a step never got, because nothing in the cluster could hold it."""
    number, when = event.data["attempt"], event.time
    return Attempt(number=number, state="failed", began=when, ended=when, log="", lines=(), said=event.data)


def _step(
    name: str,
    planned: Mapping[str, Any],
    attempts: tuple[Attempt, ...],
    drivers: Sequence[Sequence[Event]],
    store: Store,
    status: str,
) -> Step:
    own = [e for driver in drivers for e in driver if e.step == name and e.kind != "wait"]
    ends = [e for e in own if e.kind in ("commit", "reuse")]
    made = ends[-1].data if ends else {}
    pending = "waiting" if status == "running" else "skipped"
    lines: Lines = attempts[-1].lines if attempts else ()
    if not own:
        state = pending
    elif own[-1].kind == "reuse":
        here = any(a.state == "done" for a in attempts)  # by an earlier driver of the same run
        state = "done" if here else "reused"
        lines = lines if here else _lines_of_maker(store, planned["fingerprint"])
    elif status == "running" and not any(e.step == name and e.kind != "wait" for e in drivers[-1]):
        state = pending
    else:
        state = attempts[-1].state
    waits = tuple(str(e.data["why"]) for driver in drivers for e in driver if (e.kind, e.step) == ("wait", name))
    return Step(name=name, planned=planned, state=state, attempts=attempts, made=made, lines=lines, waits=waits)


def _lines_of_maker(store: Store, fingerprint: str) -> Lines:
    """What was measured when a stored result was made, as far as that run is still there."""
    result = store.result(fingerprint)
    if result is None:
        return ()
    logs = store.storage.list(f"runs/{result.run}/logs/{result.step}")
    return measured(store.storage, max(logs, key=_attempt_number)) if logs else ()


def _attempt_number(log: str) -> int:
    return int(log.rpartition("/")[2].removesuffix(".log"))
