"""What a run has spent, and whether it may go on. Pure: no Ray, no clock, no files."""

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.profile import HEAD, Profile
from pipelines.lineage import Event, by_driver
from pipelines.problems import Problem
from pipelines.steps import StepSpec
from pipelines.usage import HOUR_S, spans

DRAIN_S = 30.0
UNPRICED = "no machine has a price, expected price_per_hour in the profile"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What all drivers of a run may spend together.

    Attributes:
        deadline_s: Seconds for which they may work.
        max_cost: What the machines may cost meanwhile, in the profile's currency.
    """

    deadline_s: float = math.inf
    max_cost: float = math.inf

    @classmethod
    def of(cls, arguments: Namespace) -> "Limits":
        """Those that a command line sets."""
        asked = {"deadline_s": getattr(arguments, "deadline", 0.0), "max_cost": getattr(arguments, "max_cost", 0.0)}
        return cls(**{name: value for name, value in asked.items() if value})

    @property
    def any(self) -> bool:
        """Whether there is one at all."""
        return min(self.deadline_s, self.max_cost) < math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Seconds of drivers, and what the machines have cost in them, whoever has used these."""

    seconds: float = 0.0
    cost: float = 0.0

    def after(self, seconds: float, nodes: Mapping[str, float], profile: Profile | None) -> "Spent":
        """The same after some more seconds with so many machines of each group, the head besides."""
        return Spent(seconds=self.seconds + seconds, cost=self.cost + _cost(seconds, nodes, profile))


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a driver has to know about what its run spends.

    Attributes:
        limits: What it may spend.
        profile: Has the prices; without one nothing costs anything, and no machines are counted.
        before: What the drivers before have spent.
    """

    limits: Limits = Limits()
    profile: Profile | None = None
    before: Spent = Spent()

    @property
    def drain_s(self) -> float:
        """Seconds that steps get to keep what they have, when the run ends before they do."""
        return DRAIN_S if self.profile is None else self.profile.drain_s


def spent(events: Iterable[Event], profile: Profile | None, now: float = 0.0, *, step: str = "") -> Spent:
    """What the events of a run tell of all its drivers.

    Args:
        events: All of one run.
        profile: Has the prices; without one nothing costs anything.
        now: The time, where the last driver lives.
        step: Only what was spent while this step ran, whoever used the machines; empty for all.
    """
    so_far = Spent()
    drivers = by_driver(events)
    for own in drivers:
        until = now if own is drivers[-1] else 0.0
        times = list(_ran(own, step, until)) if step else [(own[0].time, math.inf)]
        for span in spans(own, until):
            seconds = math.fsum(max(0.0, min(span.ended, over) - max(span.began, began)) for began, over in times)
            so_far = so_far.after(seconds, span.counts, profile)
    return so_far


def _ran(own: Sequence[Event], step: str, now: float) -> Iterator[tuple[float, float]]:
    """When a step of one driver ran, from when to when."""
    began = math.inf
    for event in own:
        if event.step == step and event.kind == "start":
            began = event.time
        elif event.step == step and event.kind in ("commit", "fail") and began < math.inf:
            yield began, event.time
            began = math.inf
    if began < math.inf:
        yield began, max(now, own[-1].time)


def senseless(limits: Limits, profile: Profile) -> Iterator[Problem]:
    """What is wrong with limits on a profile's cluster: one that is passed at once, and one that never is."""
    if limits.deadline_s <= profile.drain_s:
        allowed = f"more than the profile's drain_s of {profile.drain_s:g} s, for which steps may take to end"
        yield Problem(("--deadline",), f"--deadline: {limits.deadline_s:g} s, expected {allowed}.")
    if limits.max_cost < math.inf and not priced(profile):
        yield Problem(("--max-cost",), f"--max-cost: {UNPRICED}.")


def priced(profile: Profile | None) -> bool:
    """Whether it is known what some machine costs."""
    return profile is not None and profile.cost(dict.fromkeys((HEAD, *profile.groups), 1.0)) > 0


def unpriced(steps: Mapping[str, StepSpec], profile: Profile | None) -> Iterator[Problem]:
    """The steps that are to end before they have cost too much, where nobody knows what anything costs."""
    for name, step in steps.items():
        if step.params.get("max_cost") and not priced(profile):
            why = UNPRICED if profile is not None else "no profile, expected one with prices. Name it with --cluster"
            yield Problem(("steps", name, "params", "max_cost"), f"max_cost: {why}.")


def passed(limits: Limits, so_far: Spent, ahead_s: float, nodes: Mapping[str, float], profile: Profile | None) -> str:
    """Why a run has to end now; nothing where it may go on.

    Args:
        limits: What it may spend.
        so_far: What it has spent.
        ahead_s: Seconds until somebody looks again, and until all that runs has ended then.
        nodes: How many machines of each group there are.
        profile: Has the prices.
    """
    then = so_far.after(ahead_s, nodes, profile)
    if then.seconds > limits.deadline_s:
        return (
            f"it has worked for {so_far.seconds / HOUR_S:.2f} h, and would pass its deadline of "
            f"{limits.deadline_s / HOUR_S:.2f} h. Go on with a larger --deadline"
        )
    if then.cost > limits.max_cost:
        currency = profile.currency if profile is not None else ""
        return (
            f"it has cost {so_far.cost:.2f} {currency}, and would pass its --max-cost of {limits.max_cost:.2f}. "
            "Go on with a larger one"
        )
    return ""


def _cost(seconds: float, nodes: Mapping[str, float], profile: Profile | None) -> float:
    if profile is None:
        return 0.0
    return profile.cost({name: count * seconds / HOUR_S for name, count in {HEAD: 1.0, **nodes}.items()})
