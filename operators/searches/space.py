"""What a search varies and what it looks for, and what is wrong with that before anything runs. Pure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lfm.errors import FieldError
from lfm.method import FIELDS
from operators.base import Settings

Sampler = Literal["tpe", "random", "grid", "cma_es"]
LEARNING: tuple[Sampler, ...] = ("tpe", "cma_es")
"""The samplers that draw by what became of earlier trials."""
MIDDLE = 0.381966  # of the way between two bounds: no integer, as the golden section is irrational


class SearchError(FieldError):
    """A dimension that nothing can be drawn from, or a rule that could end no trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """The values that a search gives one field of a step; exactly one of the first four says which.

    Attributes:
        uniform: A number between two bounds.
        log_uniform: The same, with equal chances for equal ratios; bounds > 0.
        integer: A whole number between two bounds, which may be drawn too.
        choice: One of some values.
        when: Other fields of the space with the value that each must have; else this one stays as it is written.
    """

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None
    choice: tuple[Any, ...] | None = None
    when: Mapping[str, Any] = field(default_factory=dict)

    __pydantic_config__ = FIELDS

    def __post_init__(self) -> None:
        given = [k for k in ("uniform", "log_uniform", "integer", "choice") if getattr(self, k) is not None]
        if len(given) != 1:
            allowed = "exactly one of uniform, log_uniform, integer and choice"
            raise SearchError("dimension", given[1] if given else "choice", " and ".join(given) or None, allowed)
        name = given[0]
        for holds, allowed in (
            (self.choice is None or len(self.choice) >= 1, "at least one value"),
            (self.bounds is None or self.bounds[0] < self.bounds[1], "two bounds, the lower one first"),
            (self.bounds is None or all(map(math.isfinite, self.bounds)), "finite bounds"),
            (self.log_uniform is None or self.log_uniform[0] > 0, "bounds > 0"),
        ):
            if not holds:
                raise SearchError("dimension", name, getattr(self, name), allowed)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the greatest number; None where values are named."""
        return self.uniform or self.log_uniform or self.integer

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values, in order; None where there is no end of them."""
        if self.integer is not None:
            return tuple(range(self.integer[0], self.integer[1] + 1))
        return self.choice

    @property
    def telling(self) -> tuple[Any, ...]:
        """The values that have to be allowed if all are: both ends, one between them, or each that is named."""
        if self.choice is not None:
            return self.choice
        assert self.bounds is not None
        low, high = self.bounds
        if self.integer is not None:
            return (low, high)
        middle = low * (high / low) ** MIDDLE if self.log_uniform else low + (high - low) * MIDDLE
        return (low, high, middle)

    def holds(self, value: Any) -> bool:
        """Whether a value could be drawn."""
        if self.values is not None:
            return any(_same(value, one) for one in self.values)
        assert self.bounds is not None
        low, high = self.bounds
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Ends trials early that do worse than others at the same point of one step (ASHA).

    Attributes:
        step: The step, one that reports how far it is and what it measures there: one that trains.
        measure: What it reports by which trials are compared; without one its ``loss``, where there is one objective.
        direction: Which way is better.
        first: How far that step has to be before a trial may be ended, in its own steps.
        last: From where on none is ended any more; above `first`.
        factor: Only the best one of so many goes on, at `first` and at each `factor` times as far.
    """

    step: str
    first: int
    last: int
    measure: str = ""
    direction: Literal["minimize", "maximize"] = "minimize"
    factor: int = 4

    __pydantic_config__ = FIELDS

    def __post_init__(self) -> None:
        for holds, name, allowed in (
            (self.first >= 1, "first", "first >= 1"),
            (self.last > self.first, "last", "last > first"),
            (self.factor >= 2, "factor", "factor >= 2"),
        ):
            if not holds:
                raise SearchError("stop", name, getattr(self, name), allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Population:
    """Has all trials train at once, and the worst take the best ones' weights and values now and then (PBT).

    When all have rested at the same step, each of the worst goes on from the checkpoint of one of the best, with that
    one's values moved a little or drawn anew: of numbers 0.8 or 1.2 times as much, of choices the one beside it.

    Attributes:
        step: The step, one that trains; its fields alone are varied, such as may change while it trains.
        measure: What it reports by which trials are compared; without one its ``loss``, where there is one objective.
        direction: Which way is better.
        every: Its own steps from one comparison to the next.
        last: No comparison comes after so many of them; at least `every`.
        share: Of the trials, how many are replaced each time, in (0, 0.5].
        drawn: How often a value is drawn anew instead of moved, in [0, 1].
    """

    step: str
    every: int
    last: int
    measure: str = ""
    direction: Literal["minimize", "maximize"] = "minimize"
    share: float = 0.25
    drawn: float = 0.25

    __pydantic_config__ = FIELDS

    def __post_init__(self) -> None:
        for holds, name, allowed in (
            (self.every >= 1, "every", "every >= 1"),
            (self.last >= self.every, "last", "last >= every"),
            (0 < self.share <= 0.5, "share", "0 < share <= 0.5"),
            (0 <= self.drawn <= 1, "drawn", "0 <= drawn <= 1"),
        ):
            if not holds:
                raise SearchError("population", name, getattr(self, name), allowed)


def followed(of: Stop | Population) -> str:
    """The measure by which trials are compared on the way."""
    return of.measure or "loss"


Space = Mapping[str, Dimension]
"""By ``STEP.FIELD``, as `--set` has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A number of an evaluation that is to be small or large.

    Attributes:
        measure: Such as ``loss``; where `on` is empty, one of the evaluation itself, such as ``parameters``.
        direction: Which way is better.
        on: The set that it is measured on.
    """

    measure: str
    direction: Literal["minimize", "maximize"]
    on: str = ""

    __pydantic_config__ = FIELDS

    @property
    def name(self) -> str:
        """As tables and plots have it."""
        return f"{self.measure} on {self.on}" if self.on else self.measure

    @property
    def sign(self) -> int:
        """What its values are multiplied with so that smaller is better."""
        return 1 if self.direction == "minimize" else -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent(Settings):
    """How far a search goes.

    Attributes:
        num_trials: Trials, the steps as they are written among them where these lie in the space.
        max_hours: Hours after which none begins and those that are under way are ended; 0 for no limit.
        max_cost: What the machines may cost meanwhile, in the currency of the profile, which has their prices: no trial
            begins that would probably pass it, and those that are under way then are ended before they do; 0 for no
            limit.
        concurrency: Trials at once; 0 for as many as the cluster has room for.
    """

    noise = frozenset({"concurrency"})

    num_trials: int = 20
    max_hours: float = 0.0
    max_cost: float = 0.0
    concurrency: int = 0

    def __post_init__(self) -> None:
        self.require(self.num_trials >= 1, "num_trials", "num_trials >= 1")
        self.require(self.max_hours >= 0, "max_hours", "hours, max_hours >= 0")
        self.require(self.max_cost >= 0, "max_cost", "max_cost >= 0, where 0 is no limit")
        self.require(self.concurrency >= 0, "concurrency", "concurrency >= 0, where 0 has it computed")


def active(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The drawn values that count: those of dimensions whose conditions hold, in the space's order."""
    found: dict[str, Any] = {}
    for key, dimension in space.items():
        if key in drawn and fulfilled(dimension, found):
            found[key] = drawn[key]
    return found


def fulfilled(dimension: Dimension, found: Mapping[str, Any]) -> bool:
    """Whether the conditions of a dimension hold, given the values that count of those before it."""
    return all(k in found and _same(found[k], v) for k, v in dimension.when.items())


def problems_of(
    space: Space,
    objectives: Sequence[Objective],
    sampler: Sampler,
    extent: Extent,
    stop: Stop | None = None,
    population: Population | None = None,
) -> Iterator[str]:
    """What keeps a search from being made, a clause each."""
    if not space:
        yield "space: empty, expected at least one STEP.FIELD. Write it as space: {merged.density: {uniform: [0, 1]}}."
    if not objectives:
        yield "objectives: empty, expected at least one. Write it as [{on: SET, measure: loss, direction: minimize}]."
    yield from _conditions(space)
    if sampler == "cma_es":
        yield from _not_numbers(space)
        if len(objectives) > 1:
            what = f"sampler='cma_es' with {len(objectives)} objectives"
            yield f"{what}, expected one: it follows a single number. Take 'tpe', or one objective."
    if sampler == "grid":
        yield from _endless(space, extent)
    for name, rule in (("stop", stop), ("population", population)):
        if rule is not None and not rule.measure and len(objectives) > 1:
            what = f"{name}: no measure beside {len(objectives)} objectives"
            yield f"{what}, expected the one of step {rule.step!r} by which trials are compared. Name it."
    if population is not None:
        yield from _unpopulated(space, sampler, extent, stop, population)


def _unpopulated(
    space: Space, sampler: Sampler, extent: Extent, stop: Stop | None, population: Population
) -> Iterator[str]:
    """What a population cannot be searched with; Ray Tune would fail, or say nothing and do something else."""
    if sampler in LEARNING:
        fix = "It draws its first trials alone, and learns by itself."
        yield f"sampler={sampler!r} with a population, expected 'random' or 'grid'. {fix}"
    if stop is not None:
        yield "stop: given with a population, expected one of the two. A population replaces what does worse."
    if extent.num_trials < 2:
        yield f"num_trials={extent.num_trials} with a population, expected at least 2. They learn from each other."
    for key, dimension in space.items():
        step = key.partition(".")[0]
        if step != population.step:
            what = f"space: {key!r} with a population of step {population.step!r}"
            yield f"{what}, expected fields of that step alone. Search others by themselves."
        if dimension.when:
            yield f"space: {key!r} is conditional, expected none that is with a population. Leave out its when."


def _conditions(space: Space) -> Iterator[str]:
    """Conditions on what is not drawn before; so no two can wait for each other."""
    known = list(space)
    for key, dimension in space.items():
        for other, value in dimension.when.items():
            before = known[: known.index(key)]
            if other not in before:
                yield f"space: {key!r} when {other!r}, expected a field above it in the space. Put that one first."
            elif space[other].choice is None:
                yield f"space: {key!r} when {other!r}, expected one that is a choice. Make it one."
            elif not space[other].holds(value):
                yield f"space: {key!r} when {other!r} is {value!r}, expected one of its values. Take one of them."


def _not_numbers(space: Space) -> Iterator[str]:
    for key, dimension in space.items():
        what = "a choice" if dimension.choice is not None else "conditional" if dimension.when else ""
        if what:
            yield f"space: {key!r} is {what}, expected numbers alone for sampler='cma_es'. Take 'tpe', or leave it out."


def _endless(space: Space, extent: Extent) -> Iterator[str]:
    endless = [key for key, dimension in space.items() if dimension.values is None]
    for key in endless:
        yield f"space: {key!r} has no end of values, expected choice or integer for sampler='grid'. Name the values."
    size = math.prod(len(d.values or ()) for d in space.values())
    if not endless and size > extent.num_trials:
        yield f"num_trials={extent.num_trials}, expected at least the {size} points of the grid. Raise it."


def front(rows: Sequence[Sequence[float]]) -> list[int]:
    """The numbers of the rows that no other one beats: nowhere worse and somewhere better, where smaller is better."""
    return [i for i, one in enumerate(rows) if not any(_beats(other, one) for other in rows)]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _same(one: Any, other: Any) -> bool:
    """Equality in which true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
