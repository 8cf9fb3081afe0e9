"""Events -> what a run really took: hours of machines and what these cost, step by step, and of idle ones. Pure."""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from cluster.capacity import ROUNDING
from cluster.profile import HEAD, Machine, Profile
from operators.resources import Resources
from pipelines.lineage import TRIAL, Event, by_driver
from pipelines.profiles import profile_of
from pipelines.spec import RESOURCES

HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A time in which a cluster had as many machines of each node group, the head besides."""

    began: float
    ended: float
    counts: Mapping[str, int]

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.ended - self.began


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A time in which workers of a step were somewhere.

    Attributes:
        step: Of the run; for a search, what its trials held.
        asks: What its workers asked for.
        group: The node group of its machine; empty where nobody has noted it, as of workers beside a step's process.
    """

    step: str
    began: float
    ended: float
    asks: Resources
    group: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Hours of machines by node group, and what they cost; nothing has a cost where no machine has a price."""

    hours: Mapping[str, float] = field(default_factory=dict)
    cost: float | None = None

    @property
    def total(self) -> float:
        """Hours of all machines."""
        return math.fsum(self.hours.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a run took; its lines add up to the hours of every machine that was there, and to their cost.

    Attributes:
        steps: By step, for each that held machines.
        idle: Those that no step of the run was on.
        head: The head's, on which steps are free: it is paid for anyway.
        currency: Of all costs.
    """

    steps: Mapping[str, Line]
    idle: Line
    head: Line
    currency: str

    def of(self, step: str) -> Line:
        """A step's line: nothing where it held nothing."""
        return self.steps.get(step, Line(cost=None if self.head.cost is None else 0.0))

    @property
    def whole(self) -> Line:
        """All of it."""
        lines = (*self.steps.values(), self.idle, self.head)
        costs = [line.cost for line in lines if line.cost is not None]
        return Line(hours=_added(line.hours for line in lines), cost=math.fsum(costs) if costs else None)


def usage(
    events: Sequence[Event], trials: Mapping[str, Sequence[Event]] | None = None, now: float = 0.0
) -> Usage | None:
    """What the drivers of a run that had a profile took, by the prices of each; None where none had one.

    A machine belongs to the steps that were on it, as they held it: by the largest share of its CPUs, GPUs or memory.
    One on which none was is idle. Where nobody has noted on which group a step was, it is taken to have been where a
    plan would put it: on the cheapest one that was there and had room.

    Args:
        events: All of the run.
        trials: All events of each trial below it, by the trial's name.
        now: The time, where the last driver lives.
    """
    drivers = by_driver(events)
    known = [(own, found) for own in drivers if (found := _profile(own)) is not None]
    if not known:
        return None
    currency = known[-1][1].currency
    shares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    costs: dict[str, list[float]] = defaultdict(list)
    priced = False
    for own, profile in known:
        if profile.currency != currency:  # no sum would mean anything
            continue
        priced |= any(m.price_per_hour for m in profile.machines.values())
        until = now if own is drivers[-1] else 0.0
        holdings = [*held(own, until), *_below(trials or {}, own, until)]
        for who, hours in _shared(list(spans(own, until)), holdings, profile).items():
            for group, spent in hours.items():
                shares[who][group] += spent
            costs[who].append(profile.cost(hours))
    lines = {who: Line(hours=dict(h), cost=math.fsum(costs[who]) if priced else None) for who, h in shares.items()}
    nothing = Line(cost=0.0 if priced else None)
    return Usage(
        steps={who: line for who, line in lines.items() if who not in (_IDLE, _HEAD)},
        idle=lines.get(_IDLE, nothing),
        head=lines.get(_HEAD, nothing),
        currency=currency,
    )


_IDLE, _HEAD = "(idle)", "(head)"  # no step is called so


def foreseen(events: Sequence[Event]) -> Mapping[str, Any]:
    """What plans have noted when drivers began, as JSON: of ``steps`` the first that had one to run, the ``total``.

    Nothing where no driver has noted any.
    """
    noted = [found for own in by_driver(events) if (found := own[0].data.get("estimate"))]
    if not noted:
        return {}
    steps: dict[str, Any] = {}
    for one in noted:
        for name, said in one["steps"].items():
            if not steps.get(name, {}).get("group"):  # stored, or not there yet
                steps[name] = said
    return {"steps": steps, "total": noted[0]["total"]}


def spans(own: Sequence[Event], now: float = 0.0) -> Iterator[Span]:
    """What one driver has counted: from one ``nodes`` event to the next there were so many machines.

    Args:
        own: The driver's events.
        now: The time, where it lives.
    """
    told: list[tuple[float, Mapping[str, int]]] = [(own[0].time, {})]
    told += [(e.time, e.data["nodes"]) for e in own if e.kind == "nodes"]
    ends = [*(time for time, _ in told[1:]), max(now, *(e.time for e in own))]
    since = own[0].time
    for (_, counts), ended in zip(told, ends, strict=True):
        if ended > since:
            yield Span(began=since, ended=ended, counts=counts)
            since = ended


def held(own: Sequence[Event], now: float = 0.0) -> Iterator[Held]:
    """When the steps of one driver held machines; what a search holds, its trials tell.

    Args:
        own: The driver's events.
        now: The time, where it lives.
    """
    planned: Mapping[str, Mapping[str, Any]] = own[0].data["steps"]
    begun: dict[str, Event] = {}
    for event in own:
        if event.kind == "start" and planned[event.step]["operator"] != "search":
            begun[event.step] = event
        elif event.kind in ("commit", "fail") and event.step in begun:
            yield _held(begun.pop(event.step), event, planned)
    over = Event("over", time=max(now, own[-1].time))
    for start in begun.values():
        yield _held(start, over, planned)


def _held(start: Event, end: Event, planned: Mapping[str, Mapping[str, Any]]) -> Held:
    asks = RESOURCES.validate_python(planned[start.step]["resources"])
    memory = start.data.get("eased", {}).get("memory", asks.memory)
    # It was handed over before it had its place; how long it worked it says itself, unless its process has died.
    worked = float(end.data.get("seconds", math.inf))
    return Held(
        step=start.step,
        began=max(start.time, end.time - worked),
        ended=end.time,
        asks=replace(asks, memory=memory),
        group=str(end.data.get("group", "")),
    )


def _below(trials: Mapping[str, Sequence[Event]], own: Sequence[Event], now: float) -> Iterator[Held]:
    """What trials held that began under one driver of the run above them, as the step of that run."""
    ended = max(now, own[-1].time)
    run = str(own[0].data["run"])
    for name, events in trials.items():
        step = name.removeprefix(run).split(TRIAL)[1]
        drivers = by_driver(events)
        for driver, after in zip(drivers, [*drivers[1:], []], strict=True):
            if own[0].time <= driver[0].time <= ended:
                over = driver[-1].kind == "finished"  # else its process died, at the latest with the one above it
                until = 0.0 if over else min([ended, *(e.time for e in after[:1])])
                yield from (replace(one, step=step) for one in held(driver, until))


def _profile(own: Sequence[Event]) -> Profile | None:
    said = own[0].data.get("profile")
    return profile_of(said)[0] if said else None


def _shared(counted: Sequence[Span], holdings: Sequence[Held], profile: Profile) -> dict[str, dict[str, float]]:
    """Hours of machines by who had them, a step, nobody or the head, and by group."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for span, active in _slices(counted, holdings):
        hours = span.seconds / HOUR_S
        found[_HEAD][HEAD] += hours
        for who, group, nodes in _divided(span.counts, active, profile):
            found[who][group] += nodes * hours
    return found


def _slices(counted: Sequence[Span], holdings: Sequence[Held]) -> Iterator[tuple[Span, list[Held]]]:
    """Spans in which nothing begins or ends, with all that holds something then."""
    moments = sorted({t for one in holdings for t in (one.began, one.ended)})
    coming = sorted(holdings, key=lambda one: one.began, reverse=True)
    active: list[Held] = []
    for span in counted:
        inside = moments[bisect_right(moments, span.began) : bisect_left(moments, span.ended)]
        for began, ended in pairwise([span.began, *inside, span.ended]):
            while coming and coming[-1].began <= began:
                active.append(coming.pop())
            active = [one for one in active if one.ended > began]
            yield Span(began=began, ended=ended, counts=span.counts), active


def _divided(counts: Mapping[str, int], active: Sequence[Held], profile: Profile) -> Iterator[tuple[str, str, float]]:
    """Who has how many of the machines of which group."""
    on: dict[str, list[Held]] = defaultdict(list)
    for one in sorted(active, key=lambda h: not h.group):
        on[one.group or _likely(one.asks, counts, on, profile)].append(one)
    for group, count in counts.items():
        machine, there = profile.groups.get(group), on[group]
        parts = [_part(one.asks, machine) for one in there]
        whole = math.fsum(parts)
        least = max((_machines(one.asks, machine) for one in there), default=0)
        used = min(count, max(math.ceil(whole - ROUNDING), least))
        for one, part in zip(there, parts, strict=True):
            yield one.step, group, used * part / whole
        yield _IDLE, group, float(count - used)


def _likely(asks: Resources, counts: Mapping[str, int], on: Mapping[str, Sequence[Held]], profile: Profile) -> str:
    """The group whose machines a step has most likely been on; empty where none could hold it."""
    there = {name: 1 for name in (HEAD,) if profile.head_computes} | dict(counts)
    able = {n: m for n, m in profile.machines.items() if there.get(n) and m.node().holds(**asks.each)}

    def rank(name: str) -> tuple[bool, bool, float]:
        machine = able[name]
        taken = math.fsum(_part(one.asks, machine) for one in on.get(name, ()))
        full = taken + _part(asks, machine) > there[name] + ROUNDING
        price = 0.0 if name == HEAD else machine.price_per_hour * _machines(asks, machine)
        return full, bool(machine.gpus) and not asks.gpus, price

    return min(able, key=rank, default="")


def _part(asks: Resources, machine: Machine | None) -> float:
    """How many machines all workers of a step make up, by what each asks most of."""
    if machine is None:  # of a group that the profile does not have
        return 1.0
    shares = [asks.cpus_per_worker / machine.cpus, asks.memory / machine.memory]
    shares += [asks.gpus_per_worker / machine.gpus] if machine.gpus else []
    return asks.least * min(1.0, max(shares))


def _machines(asks: Resources, machine: Machine | None) -> int:
    """On how many machines its workers are at least."""
    held = 1 if machine is None else max(1, machine.node().holds(**asks.each))
    return math.ceil(asks.least / held)


def _added(parts: Iterator[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for group, hours in part.items():
            found[group].append(hours)
    return {group: math.fsum(hours) for group, hours in found.items()}
