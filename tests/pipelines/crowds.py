"""Runs of one cluster that take turns, simulated: what each wants is known before, and a made-up clock tells when."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.capacity import Capacity
from operators.resources import Resources
from pipelines.turns import Claim, Gang, Ledger, entered, turn, without


@dataclass
class Job:
    """A step: what it asks for, and for how long it has it."""

    asks: Resources
    seconds: float


@dataclass
class Crowded:
    """A run that wants its jobs one after the other, as many at once as an empty cluster has CPUs and GPUs for.

    Attributes:
        began: When it comes.
        waited: For how long each job waited for its turn.
        spent: Seconds of GPUs that it has had while all runs had jobs left.
    """

    jobs: Sequence[Job]
    began: float = 0.0
    priority: int = 0
    account: str = ""
    waited: dict[int, float] = field(default_factory=dict)
    spent: float = 0.0
    wants: dict[int, float] = field(default_factory=dict)  # since when
    holds: dict[int, float] = field(default_factory=dict)  # until when
    given: int = 0
    said: float = 0.0

    def want(self, now: float, there: Capacity) -> None:
        while self.given < len(self.jobs) and now >= self.began:
            asked = [self.jobs[j].asks for j in (*self.wants, *self.holds, self.given)]
            if sum(a.cpus for a in asked) > there.cpus or sum(a.gpus for a in asked) > there.gpus:
                return
            self.wants[self.given] = now
            self.given += 1

    def next(self, now: float) -> float:
        """When something of its own happens."""
        return min([*self.holds.values(), *([self.began] if self.began > now else [])], default=float("inf"))

    @property
    def over(self) -> bool:
        return self.given == len(self.jobs) and not self.wants and not self.holds


class Crowd:
    """Drives runs until all are over; `check` hears of each ledger before and after a run had its turn."""

    def __init__(self, capacity, runs, check=lambda before, after, run: None):
        self.capacity, self.runs, self.check = capacity, runs, check
        self.ledger = Ledger()
        self.now = 0.0
        self.order: list[tuple[str, int]] = []  # what had its turn

    def drive(self, until: float = float("inf"), most: int = 20_000) -> None:
        for _ in range(most):
            for run in self.runs.values():
                for job in [j for j, end in run.holds.items() if end <= self.now]:
                    del run.holds[job]
            for name, run in self.runs.items():
                run.want(self.now, self.capacity)
                self.enter(name, run)
            while any(self.enter(name, run) for name, run in self.runs.items() if run.wants):
                pass  # who was asked first may have waited for one that was asked later
            later = min(run.next(self.now) for run in self.runs.values())
            if later == float("inf") or later > until:
                return
            self.pass_to(later)
        raise AssertionError("it does not come to an end")

    def pass_to(self, later: float) -> None:
        contended = all(r.began <= self.now and r.given < len(r.jobs) for r in self.runs.values())
        for run in self.runs.values():
            run.spent += contended * (later - self.now) * sum(run.jobs[j].asks.gpus for j in run.holds)
        self.now = later

    def enter(self, name: str, run: Crowded) -> bool:
        """Whether the turn of something has come."""
        if run.over:
            self.ledger = without(self.ledger, {name})
            return False
        if self.now < run.began:
            return False
        held = self.ledger.claims[name].holds if name in self.ledger.claims else ()
        since = {}
        for gang in held:
            since[gang.kind] = since.get(gang.kind, 0.0) + gang.amount * (self.now - run.said)
        run.said = self.now
        claim = Claim(
            account=run.account or name,
            priority=run.priority,
            wants=tuple(Gang(step=str(j), asks=run.jobs[j].asks) for j in run.wants),
            holds=tuple(Gang(step=str(j), asks=run.jobs[j].asks, number=0) for j in run.holds),
        )
        before = entered(self.ledger, name, claim, since)
        self.ledger = turn(before, name, self.capacity)
        self.check(before, self.ledger, name)
        new = [int(g.step) for g in self.ledger.claims[name].holds if int(g.step) in run.wants]
        for job in new:
            run.waited[job] = self.now - run.wants.pop(job)
            run.holds[job] = self.now + run.jobs[job].seconds
            self.order.append((name, job))
        return bool(new)
