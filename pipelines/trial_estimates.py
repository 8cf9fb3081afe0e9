"""Estimates of single steps -> what one trial of a search takes, and all of them together. Pure."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines.estimates import Estimate, Range
from pipelines.searches import Repetition


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialsEstimate:
    """What a search will take.

    Attributes:
        repetition: What it runs again.
        each: What one trial takes of which nothing is known before: its slowest way, what the largest of its steps
            hold, and its cost.
        together: What all take, with what they have in common once. Where some are ended early, or may not all
            begin, from as little as one.
        unknown: Steps of which nobody knows how long they take: the rest is without them.
    """

    repetition: Repetition
    each: Estimate
    together: Estimate
    unknown: tuple[str, ...]


def trials_estimate(repetition: Repetition, steps: Mapping[str, Estimate], packed: Mapping[str, int]) -> TrialsEstimate:
    """What a search takes.

    Args:
        repetition: What it runs again.
        steps: What each of the steps takes that differ between trials, when it is run, in an order in which they may.
        packed: On how many machines each is in all trials that run at the same time; they share what these cost.
    """
    shares = {n: packed[n] / (one.nodes * repetition.at_once) for n, one in steps.items() if one.nodes}
    timed = {n: _times(one, 1.0, shares[n]) for n, one in steps.items() if one.seconds is not None}
    largest = max(steps.values(), key=lambda one: (one.device[0], one.host[0]), default=Estimate(state="runs"))
    each = _together(repetition, timed, replace(largest, source="trials"))
    # Trials that run at the same time end together, and no step is made more often than it differs.
    rows = {n: math.ceil(most / repetition.at_once) for n, most in repetition.times.items()}
    every = {n: _times(one, rows[n], repetition.times[n]) for n, one in timed.items()}
    together = _together(repetition, every, replace(each, nodes=max(packed.values(), default=0)))
    return TrialsEstimate(
        repetition=repetition,
        each=each,
        together=_cut(together, each, repetition),
        unknown=tuple(n for n, one in steps.items() if one.seconds is None),
    )


def _times(one: Estimate, longer: float, dearer: float) -> Estimate:
    assert one.seconds is not None
    assert one.cost is not None
    (low, high), (least, most) = one.seconds, one.cost
    return replace(one, seconds=(longer * low, longer * high), cost=(dearer * least, dearer * most))


def _together(repetition: Repetition, timed: Mapping[str, Estimate], whole: Estimate) -> Estimate:
    """`whole` with seconds and cost of steps one after the other, as they need each other; None where nobody knows."""
    if not timed:
        return replace(whole, seconds=None, cost=None)
    ends: dict[str, Range] = {}
    for name, one in timed.items():
        before = [ends[n] for n in repetition.needs[name] if n in ends]
        low, high = one.seconds or (0.0, 0.0)
        ends[name] = max((b[0] for b in before), default=0.0) + low, max((b[1] for b in before), default=0.0) + high
    costs = [one.cost or (0.0, 0.0) for one in timed.values()]
    return replace(
        whole,
        seconds=(max(e[0] for e in ends.values()), max(e[1] for e in ends.values())),
        cost=(math.fsum(c[0] for c in costs), math.fsum(c[1] for c in costs)),
    )


def _cut(every: Estimate, each: Estimate, repetition: Repetition) -> Estimate:
    """What all take where some are ended early, or all when the time is over."""
    if every.seconds is None or every.cost is None or each.seconds is None or each.cost is None:
        return every
    (low, high), (least, most) = every.seconds, every.cost
    if repetition.early:
        low, least = min(low, each.seconds[0]), min(least, each.cost[0])
    part = min(1.0, repetition.max_s / high) if high else 1.0
    high, most = min(high, repetition.max_s), most * part
    return replace(every, seconds=(min(low, high), high), cost=(min(least, most), most))


def repetition_plain(one: Repetition) -> dict[str, Any]:
    """What a search repeats, as JSON."""
    return {**asdict(one), "shared": list(one.shared), "max_s": one.max_s if math.isfinite(one.max_s) else None}
