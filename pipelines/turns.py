"""Ledger x Capacity -> whose turn it is among the runs of one cluster. Pure: no Ray, no clock, no storage.

A gang is all that a step asks for; it gets its place as a whole or not at all, and nobody takes it away again. Of all
gangs that wait, one of the highest priority comes first, then one of the run that has been served least, then the one
that has waited longest. The first that finds no room keeps what there is of it free until it does, so that none waits
for ever behind small ones; what it leaves, later ones may have.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush, merge
from itertools import count
from typing import Any, Literal, get_args

from cluster.capacity import Capacity
from cluster.processes import BEAT_S
from operators.resources import Resources
from pipelines.rooms import closed, placed, reserved, rooms, taken

Kind = Literal["gpu", "cpu"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Served = Mapping[Kind, float]
"""Seconds for which a run has had GPUs, times their number; of gangs that need none, the same of CPUs."""
AHEAD_S = BEAT_S
"""What is held counts for so many seconds more than is known: so long it may be since its run has said so, and so runs
that have been served alike share what comes free at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """What a step asks for.

    Attributes:
        number: When it began to wait: the lower the longer ago.
        placed: Whether Ray has found machines for it, as far as that is known: they may have enough in all, but none of
            them enough for a worker. Then nothing else starts on those that could hold it until they have.
    """

    step: str
    asks: Resources
    number: int = -1
    placed: bool = True

    @property
    def kind(self) -> Kind:
        """What its run is served with."""
        return "gpu" if self.asks.gpus else "cpu"

    @property
    def amount(self) -> float:
        """How much of that."""
        return self.asks.gpus or self.asks.cpus

    @property
    def bulky(self) -> bool:
        """Whether a worker needs more of it on one machine than others leave when each takes the least."""
        return (self.asks.gpus_per_worker or self.asks.cpus_per_worker) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What a run has of a cluster and wants of it.

    Attributes:
        account: The run that is served: of a trial the one that searches, and so all its trials are one.
        priority: The higher, the earlier.
        wants: What waits for its turn.
        holds: What has had it and has not ended.
        by: The process that drives the run.
        beat: Changes while that lives.
    """

    account: str
    priority: int = 0
    wants: tuple[Gang, ...] = ()
    holds: tuple[Gang, ...] = ()
    by: Mapping[str, Any] = field(default_factory=dict)
    beat: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """All that the runs of one cluster have and want.

    Attributes:
        claims: By run.
        served: By account.
        floors: By priority, how far all that want something have been served: who comes, or comes back, begins there,
            because time in which it wanted nothing is no credit.
        next: The number of the next gang.
    """

    claims: Mapping[str, Claim] = field(default_factory=dict)
    served: Mapping[str, Served] = field(default_factory=dict)
    floors: Mapping[int, Served] = field(default_factory=dict)
    next: int = 0


def without(ledger: Ledger, gone: Collection[str]) -> Ledger:
    """The ledger without some runs."""
    claims = {run: claim for run, claim in ledger.claims.items() if run not in gone}
    accounts = {claim.account for claim in claims.values()}
    return replace(ledger, claims=claims, served={a: s for a, s in ledger.served.items() if a in accounts})


def entered(ledger: Ledger, run: str, claim: Claim, since: Served) -> Ledger:
    """The ledger with what a run has and wants now.

    Args:
        ledger: As it was.
        run: Which one.
        claim: What it has and wants; gangs that it wants already keep their numbers.
        since: With what it has been served since it entered something last.
    """
    known = {g.step: g.number for g in ledger.claims[run].wants} if run in ledger.claims else {}
    numbers = count(ledger.next)
    wants = tuple(replace(g, number=known[g.step] if g.step in known else next(numbers)) for g in claim.wants)
    before = ledger.served.get(claim.account, {})
    served = {k: before.get(k, 0.0) + since.get(k, 0.0) for k in KINDS}
    for kind in {g.kind for g in wants} - _wanted(ledger, claim.account):
        served[kind] = max(served[kind], ledger.floors.get(claim.priority, {}).get(kind, 0.0))
    new = replace(
        ledger,
        claims={**ledger.claims, run: replace(claim, wants=wants)},
        served={**ledger.served, claim.account: served},
        next=next(numbers),
    )
    return _raised(new, claim.priority)


def _wanted(ledger: Ledger, account: str) -> set[Kind]:
    """What an account has or wants."""
    return {g.kind for c in ledger.claims.values() if c.account == account for g in (*c.wants, *c.holds)}


def _raised(ledger: Ledger, priority: int) -> Ledger:
    """The ledger with the floor of a priority where those are that have been served least and want something."""
    floor = dict(ledger.floors.get(priority, {}))
    accounts = {c.account for c in ledger.claims.values() if c.priority == priority}
    wanted = {account: _wanted(ledger, account) for account in accounts}
    for kind in KINDS:
        least = min((ledger.served[a].get(kind, 0.0) for a in accounts if kind in wanted[a]), default=0.0)
        floor[kind] = max(floor.get(kind, 0.0), least)
    return replace(ledger, floors={**ledger.floors, priority: floor})


def line(ledger: Ledger) -> Iterator[tuple[str, Gang]]:
    """All that waits, with its run, in the order in which its turn comes.

    GPUs and CPUs are served by accounts of their own; of what comes next by each of the two, the older one comes first.
    """
    return merge(
        *(_line_of(ledger, kind) for kind in KINDS),
        key=lambda one: (-ledger.claims[one[0]].priority, one[1].number),
    )


def _line_of(ledger: Ledger, kind: Kind) -> Iterator[tuple[str, Gang]]:
    """The same of what is served by one kind: after each gang its run counts as served, so that others are next."""
    held: dict[str, float] = defaultdict(float)
    waiting: dict[tuple[int, str], list[tuple[int, str, Gang]]] = defaultdict(list)
    for run, claim in ledger.claims.items():
        held[claim.account] += sum(g.amount for g in claim.holds if g.kind == kind)
        waiting[-claim.priority, claim.account] += [(g.number, run, g) for g in claim.wants if g.kind == kind]
    heap: list[tuple[int, float, int, list[tuple[int, str, Gang]]]] = []
    for (priority, account), gangs in waiting.items():
        if gangs:
            heapify(gangs)
            served = ledger.served.get(account, {}).get(kind, 0.0) + AHEAD_S * held[account]
            heappush(heap, (priority, served, gangs[0][0], gangs))
    while heap:
        priority, served, _, gangs = heappop(heap)
        _, run, gang = heappop(gangs)
        yield run, gang
        if gangs:
            heappush(heap, (priority, served + AHEAD_S * gang.amount, gangs[0][0], gangs))


def turn(ledger: Ledger, run: str, capacity: Capacity, *, grows: bool = False) -> Ledger:
    """The ledger with those gangs of a run as held whose turn it is.

    A run that nobody else wants anything beside is never held back.

    Args:
        ledger: With what the run wants.
        run: Which one.
        capacity: What the cluster has or can have.
        grows: Whether machines come where there are none for a gang.
    """
    claim = ledger.claims[run]
    others = any(c.wants or c.holds for name, c in ledger.claims.items() if name != run)
    granted = set(_granted(ledger, run, capacity)) if others else {g.number for g in claim.wants}
    finds = grows or len(capacity.nodes) <= 1  # what has had its turn finds a place at once
    new = (replace(g, placed=finds or not g.bulky) for g in claim.wants if g.number in granted)
    holds = (*claim.holds, *new)
    wants = tuple(g for g in claim.wants if g.number not in granted)
    return replace(ledger, claims={**ledger.claims, run: replace(claim, wants=wants, holds=holds)})


def _granted(ledger: Ledger, run: str, capacity: Capacity) -> Iterator[int]:
    """The numbers of the run's gangs that find room, with room left for those whose turn comes before."""
    empty = rooms(capacity)
    held = [g for c in ledger.claims.values() for g in c.holds]
    free = taken([g.asks for g in held], empty)
    for gang in held:
        free = free if gang.placed else closed(gang.asks, free)
    kept = False
    for name, gang in line(ledger):
        left = placed(gang.asks, free)
        if left is not None:
            free = left
            if name == run:
                yield gang.number
        elif not kept and placed(gang.asks, empty) is not None:  # what no empty cluster could hold keeps nobody waiting
            free, kept = reserved(gang.asks, free), True


def ahead(ledger: Ledger, run: str) -> dict[str, tuple[str, ...]]:
    """The other runs that each waiting step of a run waits for: those that hold something or whose turn comes before.

    Of trials it is the runs that search.
    """
    own = ledger.claims[run].account
    before = {c.account for c in ledger.claims.values() if c.holds}
    found = {}
    for name, gang in line(ledger):
        if name == run:
            found[gang.step] = tuple(sorted(before - {own}))
        before.add(ledger.claims[name].account)
    return found
