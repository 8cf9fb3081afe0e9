"""The verb `search`: runs a part of its own pipeline again and again with other values, and hands on the best of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from lfm.errors import LfmError, UnknownName
from operators.artifact import Adapter, Dataset, Datastore, Delta, Editor, Memory, Metrics, Model, Statistics
from operators.base import operator
from operators.searches.lineages import resting
from operators.searches.members import Train
from operators.searches.purse import Purse
from operators.searches.sampling import Attempt, Course, Report, explore
from operators.searches.space import (
    LEARNING,
    Dimension,
    Extent,
    Objective,
    Population,
    Sampler,
    SearchError,
    Stop,
    active,
    followed,
    front,
    fulfilled,
    problems_of,
)
from operators.workspace import Outcome, Trials, Workspace

Searched = Model | Adapter | Delta | Editor | Memory | Datastore | Statistics | Dataset
USUAL = Extent()


class TrialFailed(LfmError, RuntimeError):
    """A trial that made nothing to judge."""

    def __init__(self, run: str, why: str) -> None:
        super().__init__(run, why)
        self.run, self.why = run, why

    def __str__(self) -> str:
        return f"trial {self.run!r}: {self.why}"


class SearchFailed(LfmError, RuntimeError):
    """A search of which every trial has failed."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(number, why)
        self.number, self.why = number, why

    def __str__(self) -> str:
        why = self.why.rstrip(".")
        return f"search: all {self.number} trials have failed, the first with: {why}. Narrow the space."


def _foreseen(
    *,
    space: Mapping[str, Dimension],
    objectives: Sequence[Objective],
    sampler: Sampler = "tpe",
    stop: Stop | None = None,
    population: Population | None = None,
    extent: Extent = USUAL,
    **others: object,
) -> Iterator[str]:
    yield from problems_of(space, objectives, sampler, extent, stop, population)


@operator(
    starts_workers=True,
    problems=_foreseen,
    takes_ensembles=("result",),
    follows="result",
    repeats=("result", "judged"),
)
def search(
    work: Workspace,
    *,
    result: Searched,
    judged: Metrics,
    space: Mapping[str, Dimension],
    objectives: Sequence[Objective],
    sampler: Sampler = "tpe",
    seed: int = 0,
    stop: Stop | None = None,
    population: Population | None = None,
    extent: Extent = USUAL,
) -> Searched:
    """Try other values for fields of the steps that make `result` and `judged`, and hand on the best result.

    Each trial is a run of its own, against the same store: what two of them have in common is computed once. The
    steps as they are written are the first one. A trial that fails is noted and stops nothing.

    Args:
        work: The step's workspace.
        result: The step whose result is wanted; what the best trial made of it is handed on.
        judged: The step that evaluates it.
        space: What is varied, by ``STEP.FIELD``.
        objectives: What is looked for in what `judged` measures. The first one says which trial is the best; of
            several the table also says which trials no other one beats in all of them.
        sampler: ``tpe`` and ``cma_es`` learn from trials, ``random`` draws and ``grid`` takes every point.
        seed: Of what is drawn.
        stop: Ends trials early that do worse than others at the same point of one step.
        population: Replaces trials that do worse by others, on the way through one step; `num_trials` is its size.
        extent: How far it goes.

    Raises:
        SearchFailed: Every trial has failed.
        UnknownName: The evaluation does not have what an objective names.
    """
    trials = work.trials()
    as_written = active(space, trials.written(space))
    first = Outcome(run="", changes=as_written, state="done", made={"result": result, "judged": judged})
    known = measured(objectives, first)  # an objective that is not there is said now
    before = trials.outcomes()
    concurrency = min(extent.concurrency or trials.at_once(space), extent.num_trials)
    purse = purse_of(trials, extent, concurrency)
    course = Course(
        sampler=sampler,
        # What learns is told of trials that were broken off, and would draw again what it drew first after as many.
        seed=seed + len(before) if sampler in LEARNING else seed,
        extent=extent,
        concurrency=concurrency,
        known=known_points(space, first, before),
        stop=stop,
        population=population,
        closed=purse.closed,
        over=purse.over,
    )
    print(f"search: {extent.num_trials} trials, {course.concurrency} at once; as written: {_said(objectives, known)}")
    done, best = 0, known[0]

    def heard(values: Sequence[float]) -> None:
        nonlocal done, best
        done += 1
        purse.ended = done
        if values:
            best = min(best, values[0], key=lambda value: objectives[0].sign * value)
        now = {objectives[0].name: values[0]} if values else {}
        work.progress(done, max(done, extent.num_trials), best=best, **now)

    attempt: Attempt | Train = partial(judged_at, trials, as_written, known, tuple(objectives), stop)
    if population is not None:
        attempt = partial(trained_until, trials, tuple(objectives), population)
    explore(attempt, space, objectives, course, folder=work.scratch / "tune", heard=heard)
    if population is not None:
        trials.forget(population.step)
    ended = [one for one in trials.outcomes() if not (one.state == "stopped" and resting(one.changes, population))]
    return best_of(result, objectives, [first, *ended])


def purse_of(trials: Trials, extent: Extent, concurrency: int) -> Purse:
    """What the search may spend; where that is not limited, nobody asks what anything costs.

    Raises:
        SearchError: It is limited, and nothing has a price.
    """
    if not extent.max_cost:
        return Purse(most=math.inf, at_once=concurrency, spent=lambda: 0.0)
    if trials.spent() is None:
        raise SearchError("search", "max_cost", extent.max_cost, "0 without prices of machines, which a profile has")
    return Purse(most=extent.max_cost, at_once=concurrency, spent=lambda: trials.spent() or 0.0)


def judged_at(
    trials: Trials,
    as_written: Mapping[str, Any],
    known: Sequence[float],
    objectives: Sequence[Objective],
    stop: Stop | None,
    changes: Mapping[str, Any],
    report: Report,
) -> Sequence[float]:
    """The values of the objectives at a point of the space, in the process of a trial; none where it was stopped.

    Raises:
        TrialFailed: It made nothing to judge.
    """
    if changes == as_written:  # which has been run before the search
        return known

    def heard(at: int, measures: Mapping[str, float]) -> None:
        if stop is not None and followed(stop) in measures:
            report(at, measures[followed(stop)])

    done = trials.run(changes) if stop is None else trials.run(changes, step=stop.step, heard=heard)
    if done.state == "stopped":
        return ()
    if done.state != "done":
        raise TrialFailed(done.run, done.error or done.state)
    return measured(objectives, done)


def trained_until(
    trials: Trials, objectives: Sequence[Objective], population: Population, changes: Mapping[str, Any]
) -> float | Sequence[float]:
    """What a trial of a population measures where it rests, or the values of the objectives at its end.

    One that fails on the way is the worst of all there, so that another one takes its place.

    Raises:
        TrialFailed: It failed at its end.
        UnknownName: It does not measure what trials are compared by.
    """
    done = trials.run(changes)
    if done.state == "stopped":
        measure = followed(population)
        if measure not in done.measures:
            raise UnknownName(f"measure of step {population.step!r}", measure, tuple(done.measures))
        return float(done.measures[measure])
    if done.state == "done":
        return measured(objectives, done)
    if resting(changes, population):
        return math.inf if population.direction == "minimize" else -math.inf
    raise TrialFailed(done.run, done.error or done.state)


def measured(objectives: Sequence[Objective], trial: Outcome) -> tuple[float, ...]:
    """The values of the objectives.

    Raises:
        UnknownName: The evaluation does not have what one names.
    """
    return tuple(_one(objective, trial.made["judged"].about) for objective in objectives)


def _one(objective: Objective, about: Mapping[str, Any]) -> float:
    found = about
    if objective.on:
        sets = about.get("sets", {})
        if objective.on not in sets:
            raise UnknownName("set of the evaluation", objective.on, tuple(sets))
        found = sets[objective.on]
    value = found.get(objective.measure)
    if isinstance(value, bool) or not isinstance(value, int | float):
        numbers = tuple(k for k, v in found.items() if isinstance(v, int | float))
        raise UnknownName("measure of the evaluation", objective.measure, numbers)
    return float(value)


def known_points(space: Mapping[str, Dimension], first: Outcome, before: Sequence[Outcome]) -> list[Mapping[str, Any]]:
    """Points that are tried first: as it is written, if that lies in the space, and what earlier attempts tried."""
    needed = [k for k, d in space.items() if fulfilled(d, first.changes)]
    written = [first.changes] if all(space[k].holds(first.changes.get(k)) for k in needed) else []
    return [*written, *(one.changes for one in before)]


def _values(objectives: Sequence[Objective], trials: Sequence[Outcome]) -> list[tuple[Outcome, tuple[float, ...]]]:
    return [(one, measured(objectives, one)) for one in trials if one.state == "done"]


def best_of(result: Searched, objectives: Sequence[Objective], trials: Sequence[Outcome]) -> Searched:
    """The result of the trial that is the best by the first objective, with the table of all in its ``about``.

    Raises:
        SearchFailed: Every trial but what is written has failed.
    """
    judged = _values(objectives, trials)
    failed = [one for one in trials if one.state == "failed"]
    if len(judged) == 1 and failed:
        raise SearchFailed(len(failed), failed[0].error)
    signs = [o.sign for o in objectives]
    rows = [tuple(s * v for s, v in zip(signs, values, strict=True)) for _, values in judged]
    best, values = judged[min(range(len(judged)), key=lambda i: rows[i][0])]
    unbeaten = [judged[i][0].run for i in front(rows)]
    known = {one.run: values for one, values in judged}
    made = best.made["result"]
    print(f"search: the best of {len(trials)} trials has {_said(objectives, values)} with {dict(best.changes)}")
    report = {
        "objectives": [{**asdict(o), "name": o.name} for o in objectives],
        "best": best.run,
        "front": unbeaten,
        "trials": [_row(one, known.get(one.run, ())) for one in trials],
    }
    return replace(result, uri=made.uri, digest=made.digest, about={**made.about, "search": report})


def _row(trial: Outcome, values: Sequence[float]) -> dict[str, Any]:
    """A trial as the table has it; its run is empty where it is the pipeline as it is written."""
    return {
        "run": trial.run,
        "changes": dict(trial.changes),
        "values": list(values),
        "state": trial.state,
        "error": trial.error,
        "seconds": trial.seconds,
        "computed": len(trial.computed),
        "reused": len(trial.reused),
    }


def _said(objectives: Sequence[Objective], values: Sequence[float]) -> str:
    return ", ".join(f"{o.name} {v:.4g}" for o, v in zip(objectives, values, strict=True))
