"""A space -> trials, drawn by Ray Tune or by Optuna through it; this is the only file that builds a `Tuner`."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators.searches.members import AT, FOLLOWED, Train, member, replacing
from operators.searches.space import (
    LEARNING,
    Dimension,
    Extent,
    Objective,
    Population,
    Sampler,
    Space,
    Stop,
    active,
    fulfilled,
)

Values = Mapping[str, Any]
Report = Callable[[int, float], None]
"""Says how far a trial is and what it measures there; does not return where the trial is to end."""
Attempt = Callable[[Values, Report], Sequence[float]]
"""The values of the objectives at a point, none where it was ended early."""
PLACE = 0.001  # of the resource that a machine's address is: a trial's driver computes nothing, and has to be placed


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How a search goes on.

    Attributes:
        sampler: Who draws.
        seed: Of what is drawn.
        extent: How many, and until when.
        concurrency: Trials at once.
        known: Points that are tried first, in order; what was tried before is answered from what became of it.
        stop: When a trial is ended early; None for never.
        population: When trials are replaced by others; None for never.
        closed: Whether no trial may begin any more.
        over: Whether those that have begun are to end.
    """

    sampler: Sampler
    seed: int
    extent: Extent
    concurrency: int
    known: Sequence[Values] = ()
    stop: Stop | None = None
    population: Population | None = None
    closed: Callable[[], bool] = lambda: False
    over: Callable[[], bool] = lambda: False


def explore(
    attempt: Attempt | Train,
    space: Space,
    objectives: Sequence[Objective],
    course: Course,
    *,
    folder: Path,
    heard: Callable[[Sequence[float]], None],
) -> None:
    """Try points of a space, each in a process of its own on this machine.

    Args:
        attempt: Runs a trial, with a population a part of one; sent to other processes. What it raises is the trial's
            end.
        space: What is varied.
        objectives: What is looked for.
        course: How.
        folder: Where Tune may write.
        heard: Called with the values of a trial that has ended, with none where it failed.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # on the way there is no objective yet
    import ray
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    keep_secrets()
    folder.mkdir(exist_ok=True)
    names = [f"objective {number}" for number, _ in enumerate(objectives, 1)]

    population, at_once = course.population, course.concurrency  # no more of it goes to where trials work

    def report(at: int, value: float) -> None:
        tune.report({AT: at, FOLLOWED: value})

    def trainable(config: Values) -> None:
        values = active(space, decoded(space, config))
        if population is not None:
            member(attempt, population, names, values, places=folder, number=at_once)  # type: ignore[arg-type]
            return
        found = attempt(values, report)  # type: ignore[call-arg]
        tune.report(dict(zip(names, found, strict=False)))  # type: ignore[arg-type]

    class Stopper(tune.Stopper):  # type: ignore[misc]
        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return course.over()

    class Heard(tune.Callback):  # type: ignore[misc]
        def on_trial_complete(self, *_: object, trial: Any, **__: object) -> None:
            heard([trial.last_result[name] for name in names if name in trial.last_result])

        def on_trial_error(self, *_: object, **__: object) -> None:
            heard([])

    # Drivers stay with the search, whose machine has to live as long as they do: elsewhere each would be one more whose
    # loss ends trials, and which is never idle. What they start goes where there is room. A share of a CPU would place
    # them anywhere, and would keep a step for ever from a machine of which it asks for all CPUs.
    here = f"node:{ray.util.get_node_ip_address()}"
    optuna = course.sampler in LEARNING
    tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0, here: PLACE}),
        param_space={} if optuna else {k: _domain(d, grid=course.sampler == "grid") for k, d in space.items()},
        tune_config=tune.TuneConfig(
            search_alg=searcher(space, names, objectives, course) if optuna else _tunes_own(course),
            scheduler=_scheduler(course, space),
            num_samples=1 if course.sampler == "grid" else course.extent.num_trials,
            max_concurrent_trials=course.concurrency if course.population is None else None,
            time_budget_s=course.extent.max_hours * 3600 or None,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(folder),
            verbose=0,
            callbacks=[Heard(), JsonLoggerCallback()],
            stop=Stopper(),
        ),
    ).fit()


def keep_secrets() -> None:
    """Have Tune hand on no keys: it would put them into a runtime environment, which logs and the dashboard show.

    Its workers have their machines' keys, as all others do.
    """
    from ray.tune.execution import class_cache

    handed_on = class_cache.ENV_VARS_TO_PROPAGATE
    handed_on -= {name for name in handed_on if name.startswith("AWS_")}


def encoded(space: Space, values: Values) -> dict[str, Any]:
    """A point as samplers have it: of a choice its number, because its values may be anything."""
    return {k: _number(space[k], v) for k, v in values.items()}


def decoded(space: Space, values: Values) -> dict[str, Any]:
    """The opposite of `encoded`."""
    choices = {k: d.choice for k, d in space.items()}
    return {k: v if (named := choices[k]) is None else named[v] for k, v in values.items()}


def _number(dimension: Dimension, value: Any) -> Any:
    if dimension.choice is None:
        return value
    return next(i for i, one in enumerate(dimension.choice) if one == value)


def _domain(dimension: Dimension, *, grid: bool) -> Any:
    """A dimension as Tune has it."""
    from ray import tune

    if grid or dimension.choice is not None:
        every = list(range(len(dimension.choice))) if dimension.choice is not None else list(dimension.values or ())
        return tune.grid_search(every) if grid else tune.choice(every)
    if dimension.integer is not None:
        return tune.randint(dimension.integer[0], dimension.integer[1] + 1)
    if dimension.log_uniform is not None:
        return tune.loguniform(*dimension.log_uniform)
    assert dimension.uniform is not None
    return tune.uniform(*dimension.uniform)


def _scheduler(course: Course, space: Space) -> Any:
    """What ends trials early, or replaces them."""
    from ray.tune.schedulers import ASHAScheduler

    stop = course.stop
    if course.population is not None:
        return replacing(course.population, space, course.seed, _domain)
    if stop is None:
        return None
    return ASHAScheduler(
        time_attr=AT,
        metric=FOLLOWED,
        mode="min" if stop.direction == "minimize" else "max",
        grace_period=stop.first,
        max_t=stop.last,
        reduction_factor=stop.factor,
        stop_last_trials=False,
    )


def _tunes_own(course: Course) -> Any:
    """What draws at random, or takes one point of a grid after the other; it draws the same again."""
    from ray.tune.search.basic_variant import BasicVariantGenerator

    class Bounded(BasicVariantGenerator):  # type: ignore[misc]
        """Ends where no trial may begin any more."""

        def next_trial(self) -> Any:
            if course.closed():
                self.set_finished()
                return None
            return super().next_trial()

    at_once = course.concurrency if course.population is None else 0
    return Bounded(random_state=course.seed, max_concurrent=at_once)


def searcher(space: Space, names: Sequence[str], objectives: Sequence[Objective], course: Course) -> Any:
    """What draws and learns; `names` are what Tune calls the objectives."""
    from optuna.logging import WARNING, set_verbosity
    from optuna.samplers import CmaEsSampler, TPESampler
    from ray.tune.search.optuna import OptunaSearch

    class Patient(OptunaSearch):  # type: ignore[misc]
        """Hears of objectives alone, which come at the end of a trial; ends where no trial may begin any more."""

        def suggest(self, trial_id: str) -> Any:
            return OptunaSearch.FINISHED if course.closed() else super().suggest(trial_id)

        def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
            if all(name in result for name in names):
                super().on_trial_result(trial_id, result)

    set_verbosity(WARNING)
    ways = ["min" if o.direction == "minimize" else "max" for o in objectives]
    one = len(objectives) == 1
    sampler = (
        CmaEsSampler(seed=course.seed, warn_independent_sampling=False)
        if course.sampler == "cma_es"
        else TPESampler(seed=course.seed)
    )
    return Patient(
        space=Draws(space),
        metric=names[0] if one else list(names),
        mode=ways[0] if one else ways,
        sampler=sampler,
        points_to_evaluate=[encoded(space, point) for point in course.known],
    )


@dataclass(frozen=True)
class Draws:
    """Draws a point with an Optuna trial: what has a condition only where that holds."""

    space: Space

    def __call__(self, trial: Any) -> None:
        """Draw; who calls notes what was drawn."""
        found: dict[str, Any] = {}
        for key, dimension in self.space.items():
            if fulfilled(dimension, found):
                value = _drawn(key, dimension, trial)
                found[key] = value if dimension.choice is None else dimension.choice[value]


def _drawn(key: str, dimension: Dimension, trial: Any) -> Any:
    if dimension.choice is not None:
        return trial.suggest_categorical(key, list(range(len(dimension.choice))))
    if dimension.integer is not None:
        return trial.suggest_int(key, *dimension.integer)
    assert dimension.bounds is not None
    return trial.suggest_float(key, *dimension.bounds, log=dimension.log_uniform is not None)
