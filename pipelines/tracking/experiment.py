"""A run's journal -> what MLflow should hold of it: a parent run, and a child for every step that was executed."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from operators.artifact import Adapter, Metrics, Model, kind_of
from pipelines.lineage import Event, history, states, status
from pipelines.registry import Registry, Version
from pipelines.spec import names_in
from pipelines.storage.base import Storage
from pipelines.tracking.outbox import Stamp
from pipelines.view import measured

STATUS = {
    "running": "RUNNING",
    "serving": "FINISHED",
    "done": "FINISHED",
    "reused": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "stopped": "KILLED",
}
ENDS = ("started", "serving", "finished")  # the last of these says whether the run is over
MODELS = (kind_of(Model), kind_of(Adapter))
LONGEST = 6000  # characters of a parameter that MLflow takes


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a metric; `time` in milliseconds since 1970, as MLflow has it."""

    key: str
    value: float
    time: int
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """An artifact as a step takes or makes it.

    Attributes:
        edge: The step's parameter; empty for what it makes.
        name: The input or the step that it comes from.
        uri: Where it lies.
    """

    edge: str
    name: str
    kind: str
    digest: str
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """One step that was executed, over all its attempts.

    Attributes:
        ended: Milliseconds since 1970; None while it runs.
        series: Points in order: those of each attempt by its number, and those of what the step made as ``result``.
        judged: The digest of the model that `series` speaks of where the step is an evaluation.
    """

    step: str
    status: str
    began: int
    ended: int | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    series: Mapping[str, Sequence[Point]]
    takes: Sequence[Thing]
    makes: Thing | None
    judged: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """A registered name with all that the registry has of it."""

    name: str
    versions: Sequence[Version]
    aliases: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What MLflow should hold of one run.

    Attributes:
        name: The pipeline's, which is MLflow's experiment.
        over: Whether the journal has said so; a run whose driver was killed is not over, it can be resumed.
        stamp: How much of the run this was read from.
        below: The run that a trial is of; empty for all others.
        params: What a trial has changed.
        points: What was measured of it.
    """

    name: str
    run: str
    status: str
    began: int
    ended: int | None
    over: bool
    tags: Mapping[str, str]
    children: Sequence[Child]
    registered: Sequence[Registered]
    stamp: Stamp
    below: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    points: Sequence[Point] = ()


def read(storage: Storage, run: str) -> Experiment | None:
    """What the journal says now; None where it says nothing (any more)."""
    claims = _claims(storage, run)
    events = history(storage, run)
    if not events:
        return None
    now = status(storage, run, events)
    last = None if now == "running" else _ms(events[-1].time)
    began: Mapping[str, Any] = [e.data for e in events if e.kind == "started"][-1]
    children = list(_children(storage, run, began, events, last))
    ended = None if last is None else max([last, *(c.ended for c in children if c.ended is not None)])
    names = sorted({str(n["name"]) for e in events if (n := e.data.get("about", {}).get("registered"))})
    registry = Registry(storage)
    return Experiment(
        name=began["spec"]["name"],
        run=run,
        status=STATUS[now],
        began=_ms(events[0].time),
        ended=ended,
        over=[e.kind for e in events if e.kind in ENDS][-1] != "started",
        tags={"lfm.run": run, "lfm.status": now, "lfm.store": storage.uri, "lfm.version": began["version"]},
        children=children,
        registered=[Registered(name=n, versions=registry.versions(n), aliases=registry.aliases(n)) for n in names],
        stamp=(claims, len(events)),
        below=began.get("trial", {}).get("of", ""),
        params={_key(k): written(v) for k, v in began.get("trial", {}).get("changes", {}).items()},
        points=list(_judged(began, events)),
    )


def _judged(began: Mapping[str, Any], events: Sequence[Event]) -> Iterator[Point]:
    """What the evaluations have found by which a trial is judged, so that trials can be compared as runs."""
    steps = set(began.get("trial", {}).get("names", {}).values())
    for event in events:
        if event.kind in ("commit", "reuse") and event.step in steps and event.data["artifact"] == kind_of(Metrics):
            yield from (Point(_key(k), v, _ms(event.time), 0) for k, v in numbers(event.data["about"]))


def stamp(storage: Storage, run: str) -> Stamp:
    """How much there is of a run now."""
    return _claims(storage, run), len(history(storage, run))


def _claims(storage: Storage, run: str) -> int:
    return len(storage.list(f"runs/{run}/claims"))


def _children(
    storage: Storage, run: str, began: Mapping[str, Any], events: Sequence[Event], last: int | None
) -> Iterator[Child]:
    """The executed steps in plan order; `last` is when the run's journal ended."""
    now = states(events, began["steps"])
    logs: dict[str, dict[str, str]] = {}
    for event in events:
        if event.kind == "start":
            logs.setdefault(event.step, {})[str(event.data["attempt"])] = event.data["log"]

    def thing(name: str, edge: str = "") -> Thing:
        if name in began["inputs"]:
            return Thing(edge=edge, name=name, **began["inputs"][name])
        made = now[name].data
        uri = f"{storage.uri}/artifacts/{made['digest']}"
        return Thing(edge=edge, name=name, kind=made["artifact"], digest=made["digest"], uri=uri)

    for step, attempts in logs.items():
        planned, state = began["steps"][step], now[step]
        takes = [thing(n, edge) for edge, names in planned["inputs"].items() for n in names_in(names)]
        makes = thing(step) if state.state in ("done", "reused") else None
        went = STATUS[state.state]
        tags = {"lfm.run": run, "lfm.step": step, "lfm.operator": planned["operator"], "lfm.kind": planned["kind"],
                "lfm.fingerprint": planned["fingerprint"], "lfm.attempts": str(len(attempts))}  # fmt: skip
        if makes is not None:
            tags["lfm.digest"] = makes.digest
        if state.state == "failed":
            tags["lfm.error"] = f"{state.data['error']}: {state.data['sentence']}"[:LONGEST]
        series = {number: list(_points(storage, log)) for number, log in attempts.items()}
        if makes is not None:
            farthest = max((p.step for points in series.values() for p in points), default=0)
            new = _new(state.data["about"], makes.digest, [t.name for t in takes if t.digest == makes.digest], now)
            series["result"] = [Point(_key(k), v, _ms(state.ended), farthest) for k, v in numbers(new)]
        # Of a step whose driver was killed the journal has no end: it was heard of last when it measured last.
        heard = None if last is None else max([last, *(p.time for points in series.values() for p in points)])
        models = [t.digest for t in takes if t.edge == "model" and t.kind in MODELS]
        yield Child(
            step=step,
            status="KILLED" if went == "RUNNING" and last is not None else went,
            began=_ms(min(e.time for e in events if e.kind == "start" and e.step == step)),
            ended=_ms(state.ended) if state.ended else heard,
            tags=tags,
            params=params(planned),
            series=series,
            takes=takes,
            makes=makes,
            judged=models[0] if models and planned["kind"] == "metrics" else "",
        )


def params(planned: Mapping[str, Any]) -> dict[str, str]:
    """A step's method with its hyper-parameters, its parameters and its resources, as MLflow's parameters."""
    method = dict(planned["method"] or {})
    named = {"operator": planned["operator"], **({"method": method.pop("name")} if method else {})}
    named |= {f"method.{k}": v for k, v in method.items()} | dict(planned["params"])
    named |= {f"resources.{k}": v for k, v in planned["resources"].items()}
    return {_key(k): written(v) for k, v in named.items()}


def written(value: Any) -> str:
    """A value as MLflow takes it."""
    return (value if isinstance(value, str) else json.dumps(value))[:LONGEST]


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in JSON, by its path."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from numbers(inner, f"{path}/{key}" if path else str(key))


def _new(about: Mapping[str, Any], digest: str, handed: Sequence[str], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a step noted itself, without what came along with an input that it hands on."""
    known = [now[n].data["about"] for n in handed if n in now]
    return {k: v for k, v in about.items() if k != "registered" and not any(a.get(k) == v for a in known)}


def _points(storage: Storage, log: str) -> Iterator[Point]:
    for line in measured(storage, log):
        for key, value in line.get("measures", {}).items():
            yield Point(_key(key), float(value), _ms(line["time"]), int(line["done"]))


def _key(name: str) -> str:
    """`name` in the characters that MLflow allows."""
    return re.sub(r"[^\w.\- :/]", "_", name)[:250]


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
