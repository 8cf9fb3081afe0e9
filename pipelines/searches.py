"""A step that searches -> the steps that its trials run, with other values, and what is wrong with these. Pure."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.capacity import Capacity
from lfm.errors import LfmError
from lfm.method import Method
from operators.base import Operator
from operators.catalog import Catalog
from operators.resources import Resources
from operators.searches.lineages import CHANGES, REST
from operators.searches.space import Dimension, Population, Space, Stop, active, fulfilled
from pipelines.changes import vary, written as written_in
from pipelines.problems import Places, Problem, near, shown
from pipelines.spec import Draft, Spec, build, dump, names_in, needed

METHODS = "Choose whole ones: STEP.method: {choice: [{name: ...}, ...]}."


def part(spec: Spec, steps: tuple[str, ...]) -> Spec:
    """The pipeline without what these steps do not need."""
    wanted = set().union(*(needed(spec, n) for n in steps))
    kept = {n: s for n, s in spec.steps.items() if n in wanted}
    taken = {n for s in kept.values() for n in s.references()}
    return replace(spec, steps=kept, inputs={n: a for n, a in spec.inputs.items() if n in taken})


def varied(spec: Spec, values: Mapping[str, Any], catalog: Catalog, where: str) -> Draft:
    """The same pipeline with other values, by ``STEP.FIELD``; `where` is what messages call it."""
    raw, places = dump(spec), Places(where)
    problems = vary(raw, values, catalog)
    draft = build(raw, places, code=spec.code, catalog=catalog)
    return replace(draft, problems=(*(Problem((), p) for p in problems), *draft.problems))


def repeated(name: str, spec: Spec, verb: Operator[Any]) -> tuple[str, ...]:
    """The steps that a step runs again, as its inputs name them."""
    given = (spec.steps[name].inputs.get(edge) for edge in verb.repeats)
    return tuple(n for reference in given if reference is not None for n in names_in(reference) if n in spec.steps)


def differing(trial: Spec, fields: Iterable[str]) -> dict[str, set[str]]:
    """The steps of a trial that make something else where fields have other values, each with those fields.

    Args:
        trial: What a trial runs.
        fields: What is varied, as ``STEP.FIELD``.
    """
    varied_at = {field: field.partition(".")[0] for field in fields}
    below = {n: needed(trial, n) for n in trial.steps}
    found = {n: {f for f, step in varied_at.items() if step in below[n]} for n in trial.steps}
    return {n: decided for n, decided in found.items() if decided}


def room(asked: Iterable[Resources], there: Capacity) -> int:
    """For how many of the largest of some steps there is room at once; their drivers take none."""

    def times(asks: Resources) -> int:
        return sum(node.holds(**asks.each) for node in there.machines) // asks.least

    return max(1, min(map(times, asked), default=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Repetition:
    """What a search will run again, as far as its text tells.

    Attributes:
        trials: How many trials there are at the most.
        at_once: How many of them run at the same time.
        times: How often each step is made again that differs between trials, at the most: what two trials have in
            common is computed once. The pipeline as it is written is no part of it; its steps run before the search.
        needs: The others of these steps that each needs.
        shared: The steps that all trials have in common, which run before the search and never again.
        max_s: Seconds after which none goes on; infinite without a limit.
        early: Whether some are ended early.
    """

    trials: int
    at_once: int
    times: Mapping[str, int]
    needs: Mapping[str, tuple[str, ...]]
    shared: tuple[str, ...]
    max_s: float
    early: bool


def repetition(name: str, spec: Spec, catalog: Catalog, there: Capacity) -> Repetition:
    """What a step that searches repeats on some cluster."""
    verb = catalog.operator(spec.steps[name].operator)
    given: Mapping[str, Any] = spec.steps[name].params
    space: Space = _arguments(name, spec, verb)["space"]
    trial = part(spec, repeated(name, spec, verb))
    fields = differing(trial, space)
    trials = min(given["num_trials"], _points(space)) if given["sampler"] == "grid" else given["num_trials"]
    written = _holds(space, trial, catalog)
    drawn = trials - (written and given["sampler"] != "random")  # which draws that point by chance alone
    times = {n: max(0, min(drawn, _points({f: space[f] for f in by}) - written)) for n, by in fields.items()}
    fits = room([trial.steps[n].resources for n in fields], there)
    return Repetition(
        trials=int(trials),
        at_once=int(min(given["concurrency"] or fits, trials)),
        times={n: int(most) for n, most in times.items()},
        needs={n: tuple(o for o in trial.steps if o in needed(trial, n) & {*fields} - {n}) for n in fields},
        shared=tuple(n for n in trial.steps if n not in fields),
        max_s=given["max_hours"] * 3600 or math.inf,
        early=given["stop"] is not None,
    )


def _points(space: Space) -> float:
    """How many there are; infinite where a dimension has no end of values."""
    return math.prod(math.inf if d.values is None else len(d.values) for d in space.values())


def _holds(space: Space, trial: Spec, catalog: Catalog) -> bool:
    """Whether the pipeline as it is written is a point of the space, so that one of the trials is known before."""
    written = active(space, written_in(dump(trial), space, catalog))
    return all(space[k].holds(written.get(k)) for k in space if fulfilled(space[k], written))


def space_problems(name: str, spec: Spec, catalog: Catalog) -> Iterator[Problem]:
    """What is wrong with the steps that a step would run again, and with what it would vary of them."""
    verb = catalog.operator(spec.steps[name].operator)
    for edge in verb.repeats:
        for given in names_in(spec.steps[name].inputs.get(edge, ())):
            if given in spec.inputs:
                said = f"{edge}: {given!r} is an input, expected a step, which trials can run again. Name one."
                yield Problem(("steps", name, "inputs", edge), said)
    again = repeated(name, spec, verb)
    if not again:
        return
    trial = part(spec, again)
    for step in (n for n, s in trial.steps.items() if catalog.operator(s.operator).effect):
        what = f"trials would run {step!r}, which changes the world ({trial.steps[step].operator})"
        yield Problem(("steps", name), f"{what}, expected steps that only make something. Put it behind the search.")
    space: Space = {k: v for k, v in _arguments(name, spec, verb).get("space", {}).items() if isinstance(v, Dimension)}
    for key in space:
        for sentence in dict.fromkeys(_refused(key, space, trial, catalog)):
            yield Problem(("steps", name, "params", "space"), f"space: {sentence}")
    yield from _unmeasured(name, spec, verb)
    for rule in ("stop", "population"):
        asked = _arguments(name, spec, verb).get(rule)
        if isinstance(asked, Stop | Population):
            for sentence in _unfollowed(asked, space, trial, catalog):
                yield Problem(("steps", name, "params", rule), f"{rule}: {sentence}")


def _unfollowed(rule: Stop | Population, space: Space, trial: Spec, catalog: Catalog) -> Iterator[str]:
    """Why trials cannot be followed through a step, or their values not be changed in the middle of it."""
    if rule.step not in trial.steps:
        yield f"no step of the trials is called {rule.step!r}. {near(rule.step, trial.steps)}"
        return
    if isinstance(rule, Stop):
        return
    step = trial.steps[rule.step]
    allowed = sorted(catalog.operator(step.operator).adjustable(step.method))
    if not allowed:
        yield f"step {rule.step!r} ({step.operator}) follows no gradient, expected one that trains. Name that one."
        return
    for parameter in (CHANGES, REST):
        if step.params[parameter]:
            yield f"step {rule.step!r} has {parameter} itself, expected none: trials are given theirs. Leave it out."
    for key in space:
        where, _, field = key.partition(".")
        if where == rule.step and field.rpartition(".")[2] not in allowed:
            said = f"{key!r} cannot change while {rule.step!r} trains, expected one of {', '.join(allowed)}"
            yield f"{said}. Search others without a population."


def varied_methods(name: str, spec: Spec, catalog: Catalog) -> list[type[Method]]:
    """The methods that trials of a step may use instead of those that are written: its result depends on them too."""
    verb = catalog.operator(spec.steps[name].operator)
    if not verb.repeats:
        return []
    found = []
    for key, dimension in _arguments(name, spec, verb).get("space", {}).items():
        where, _, field = key.partition(".")
        family = catalog.operator(spec.steps[where].operator).family if where in spec.steps else None
        if field == "method" and family is not None:
            found += [catalog.method(family, str(one["name"])) for one in dimension.choice or ()]
    return found


def _arguments(name: str, spec: Spec, verb: Operator[Any]) -> dict[str, Any]:
    return verb.validated(spec.steps[name].params)


def _refused(key: str, space: Space, trial: Spec, catalog: Catalog) -> Iterator[str]:
    """Why a field cannot be varied so: it is tried with the values that tell most."""
    where, _, field = key.partition(".")
    if where in trial.inputs or (where in trial.steps and not field):
        yield f"{key!r}, expected a field of a step. Write STEP.FIELD."
    elif where not in trial.steps:
        yield f"{key!r}: no step of the trials is called {where!r}. {near(where, trial.steps)}"
    elif field in ("method.name", "name"):
        yield f"{key!r}, expected methods with their fields, which differ. {METHODS}"
    else:
        for value in space[key].telling:
            values = {**_conditions(key, space), key: value}
            try:
                draft = varied(trial, values, catalog, "trial")
            except LfmError as error:
                yield f"{key}={shown(value)}: {error}"
                continue
            yield from (p.sentence for p in draft.problems)


def _conditions(key: str, space: Space) -> dict[str, Any]:
    """The values on which a field depends, those on which these depend first."""
    found: dict[str, Any] = {}
    for other, value in space[key].when.items():
        if list(space).index(other) < list(space).index(key) if other in space else False:
            found |= {**_conditions(other, space), other: value}
    return found


def _unmeasured(name: str, spec: Spec, verb: Operator[Any]) -> Iterator[Problem]:
    """Objectives on sets that the evaluation does not measure."""
    for edge in verb.repeats:
        reference = spec.steps[name].inputs.get(edge)
        judge = spec.steps.get(reference) if isinstance(reference, str) else None
        data = None if judge is None or judge.operator != "evaluate" else judge.inputs.get("data")
        if isinstance(data, Mapping):
            from operators.measures.edit_scores import CARRIED_FACTS  # with torch, which `evaluate` has brought

            for one in _arguments(name, spec, verb).get("objectives", ()):
                if one.on and one.on not in (*data, CARRIED_FACTS):
                    said = f"objectives: {reference!r} has no set {one.on!r}. {near(one.on, data)}"
                    yield Problem(("steps", name, "params", "objectives"), said)
