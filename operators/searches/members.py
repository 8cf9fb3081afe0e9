"""The trials of a population as Ray Tune has them: they rest at the same steps, where the worst are replaced."""

import fcntl
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from operators.searches.lineages import Lineage
from operators.searches.space import Population, Space

AT, FOLLOWED = "at", "followed"
"""What Tune calls how far a trial is, and what it measures there."""
LINEAGE = "lineage.json"
LOOK_S = 0.1  # how late a trial sees that another one has made room

Train = Callable[[Mapping[str, Any]], float | Sequence[float]]
"""Called with what a run changes, gives the measure at which the trial rests, or the objectives at its end."""


def member(
    train: Train, population: Population, names: Sequence[str], config: Mapping[str, Any], *, places: Path, number: int
) -> None:
    """One trial, in a process of its own, from where it rests on; at a rest it does not return.

    Args:
        train: Runs it.
        population: When it rests.
        names: What Tune calls the objectives.
        config: The values that hold from now on.
        places: A folder that all trials have.
        number: How many of them may work at once.
    """
    from ray import tune

    kept = tune.get_checkpoint()
    lineage = Lineage(start=config) if kept is None else _read(kept).on(config)
    while (rest := lineage.next_rest(population)) is not None:
        with _place(places, number):
            found = train(lineage.changes(population, rest))
        if not isinstance(found, float):  # it had fewer steps
            break
        lineage = replace(lineage, at=rest)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / LINEAGE).write_text(lineage.text())
            tune.report({AT: rest, FOLLOWED: found}, checkpoint=tune.Checkpoint.from_directory(folder))
        lineage = lineage.on(config)
    else:
        with _place(places, number):
            found = train(lineage.changes(population, None))
    assert not isinstance(found, float)
    tune.report(dict(zip(names, found, strict=True)))


def _read(checkpoint: Any) -> Lineage:
    with checkpoint.as_directory() as folder:
        return Lineage.of((Path(folder) / LINEAGE).read_text())


@contextmanager
def _place(folder: Path, number: int) -> Iterator[None]:
    """Wait for one of so many places: Tune limits how many trials there are, and these have to be there all at once."""
    files = [(folder / f"place-{i}").open("w") for i in range(number)]
    try:
        while not any(map(_taken, files)):
            time.sleep(LOOK_S)
        yield
    finally:
        for file in files:  # which gives it back
            file.close()


def _taken(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def replacing(population: Population, space: Space, seed: int, domain: Callable[..., Any]) -> Any:
    """What lets the worst go on as the best with other values: Ray Tune's PBT, which draws the same again.

    Args:
        population: How.
        space: What is varied.
        seed: Of what is drawn.
        domain: Gives a dimension as Tune has it.
    """
    from ray.tune.schedulers import PopulationBasedTraining

    class Repeatable(PopulationBasedTraining):  # type: ignore[misc]
        """Draws by where all rest, and not by what else this process has drawn until then."""

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            with _drawing(f"{seed} {result.get(AT, 0)}"):
                return str(super().on_trial_result(controller, trial, result))

        def on_trial_error(self, controller: Any, trial: Any) -> None:
            super().on_trial_error(controller, trial)
            self._without(controller, trial)

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(controller, trial, result)
            self._without(controller, trial)

        def _without(self, controller: Any, trial: Any) -> None:
            """Compare those that rest where the one that has ended was the last that they waited for."""
            self._trial_state[trial].last_train_time = self._next_perturbation_sync
            others = [t for t in controller.get_trials() if t is not trial and not t.is_finished()]
            there = all(self._trial_state[t].last_train_time >= self._next_perturbation_sync for t in others)
            if others and there and all(t.status == "PAUSED" for t in others):
                self.on_trial_result(controller, others[0], self._trial_state[others[0]].last_result)

    numbered = {k: None if d.choice is None else list(range(len(d.choice))) for k, d in space.items()}
    return Repeatable(
        time_attr=AT,
        metric=FOLLOWED,
        mode="min" if population.direction == "minimize" else "max",
        perturbation_interval=population.every,
        hyperparam_mutations={k: numbered[k] or domain(d, grid=False) for k, d in space.items()},
        quantile_fraction=population.share,
        resample_probability=population.drawn,
        custom_explore_fn=partial(_inside, space),
        log_config=False,
        require_attrs=False,  # at its end a trial tells the objectives alone
        synch=True,  # else who is compared with whom depends on who is faster
    )


@contextmanager
def _drawing(seed: str) -> Iterator[None]:
    """Have what Tune draws from start here, and then what it was."""
    import numpy as np

    before, numbers = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)


def _inside(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values, each within its bounds: what is moved may leave them."""
    found = dict(config)
    for key, dimension in space.items():
        if dimension.bounds is not None:
            low, high = dimension.bounds
            found[key] = min(max(found[key], low), high)
    return found
