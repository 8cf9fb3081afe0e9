"""What steps noted -> what was found: evaluations, comparisons, endpoints."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipelines.lineage import StepState
from pipelines.view import seconds

MEASURES: Mapping[str, Callable[[Iterable[float]], float]] = {
    "loss": min,
    "perplexity": min,
    "exact_match": max,
    "chrf": max,
    "accuracy": max,
    "efficacy": max,
    "efficacy_exact": max,
    "efficacy_success": max,
    "efficacy_magnitude": max,
    "paraphrase": max,
    "paraphrase_exact": max,
    "paraphrase_success": max,
    "paraphrase_magnitude": max,
    "neighbour_success": max,
    "neighbour_magnitude": max,
    "specificity": max,
    "divergence": min,
    "fluency": max,
    "score": max,
    "barrier": min,
}
"""The measures of an evaluation that come first, and which of several values is the best one."""
ALWAYS = ("loss", "perplexity", "exact_match", "chrf")  # have a column in a table even where nothing has them


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What an evaluation measured on one held-out set."""

    on: str
    documents: int
    values: Mapping[str, float]


def evaluation(about: Mapping[str, Any]) -> list[Measured]:
    """What a step noted about its evaluation, set by set; nothing where its `sets` are something else."""
    sets = about.get("sets")
    if not isinstance(sets, Mapping):
        return []
    return [
        Measured(
            on=name,
            documents=int(values["documents"]),
            values={k: float(v) for k, v in values.items() if isinstance(v, int | float) and k != "documents"},
        )
        for name, values in sets.items()
        if isinstance(values, Mapping) and "documents" in values
    ]


def measurements(states: Mapping[str, StepState]) -> list[tuple[str, Measured]]:
    """Every evaluation of a run with its step, in the order of the steps."""
    return [(step, one) for step, about in _abouts(states) for one in evaluation(about)]


def comparisons(states: Mapping[str, StepState]) -> list[Mapping[str, Any]]:
    """Every requirement that the run's gates found to hold, as `operators.gating` notes it."""
    noted = [one for _, about in _abouts(states) for one in about.get("gate", ())]
    return list({one["said"]: one for one in noted}.values())  # the note travels on with the model


def endpoints(states: Mapping[str, StepState]) -> list[Mapping[str, Any]]:
    """What the run's `serve` steps brought up."""
    return [about for _, about in _abouts(states) if "probe" in about]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial of a search.

    Attributes:
        run: Its run; empty where it is the pipeline as it is written.
        values: Those of the objectives; none where it made nothing to judge.
        best: Whether its result was handed on.
        unbeaten: Whether, of several objectives, no other one is as good in all and better in one.
    """

    run: str
    changes: Mapping[str, Any]
    values: Sequence[float]
    state: str
    error: str
    seconds: float
    computed: int
    reused: int
    best: bool
    unbeaten: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What a search found, trial by trial in the order in which they began.

    Attributes:
        objectives: Their names.
        signs: 1 for each that is to be small, -1 for each that is to be large.
    """

    objectives: tuple[str, ...]
    signs: tuple[int, ...]
    trials: tuple[Trial, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """What was varied."""
        return tuple(dict.fromkeys(k for one in self.trials for k in one.changes))

    @property
    def judged(self) -> tuple[Trial, ...]:
        """The trials that have values."""
        return tuple(one for one in self.trials if one.values)


def search(about: Mapping[str, Any]) -> Search | None:
    """What a step noted about its search."""
    said = about.get("search")
    if not isinstance(said, Mapping) or not {"objectives", "best", "front", "trials"} <= said.keys():
        return None
    names = tuple(o["name"] for o in said["objectives"])
    front = said["front"] if len(names) > 1 else ()
    return Search(
        objectives=names,
        signs=tuple(1 if o["direction"] == "minimize" else -1 for o in said["objectives"]),
        trials=tuple(
            Trial(**one, best=one["run"] == said["best"], unbeaten=one["run"] in front) for one in said["trials"]
        ),
    )


def searches(states: Mapping[str, StepState]) -> list[tuple[str, Search]]:
    """Every search of a run with its step; the note travels on with what was found."""
    found: list[tuple[str, Search]] = []
    for step, about in _abouts(states):
        one = search(about)
        if one is not None and one not in [other for _, other in found]:
            found.append((step, one))
    return found


def searched_table(one: Search) -> Table:
    """Trials as rows; where there are several objectives, those that no other one beats are marked."""
    made = Table("trial", box=None, pad_edge=False, header_style="bold")
    for name in (*one.fields, *one.objectives):
        made.add_column(name, justify="right")
    made.add_column("state")
    for name in ("took", "ran", "reused"):
        made.add_column(name, justify="right")
    made.add_column("")
    for number, trial in enumerate(one.trials):
        made.add_row(str(number), *map(escape, trial_cells(one, trial)))
    return made


def trial_cells(one: Search, trial: Trial) -> list[str]:
    """A trial as a table has it, from what it changed to what is to be said of it."""
    changes = [value_text(trial.changes[k]) if k in trial.changes else "" for k in one.fields]
    values = [f"{v:.4g}" for v in trial.values] or [""] * len(one.objectives)
    mark = "best" if trial.best else "unbeaten" if trial.unbeaten else trial.error
    took = seconds(trial.seconds) if trial.run else ""
    return [*changes, *values, trial.state, took, str(trial.computed), str(trial.reused), mark]


def value_text(value: Any) -> str:
    """A value of a field, short."""
    if isinstance(value, Mapping) and "name" in value:  # a method
        inner = ", ".join(f"{k}={value_text(v)}" for k, v in value.items() if k != "name")
        return f"{value['name']}({inner})" if inner else str(value["name"])
    if isinstance(value, list | tuple) and value and all(map(_is_change, value)):
        return "; ".join(f"at {v['at']} {_named(v['values'])}" for v in value if v["values"]) or "unchanged"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_change(value: Any) -> bool:
    """Whether it says what changes in the middle of a training."""
    return isinstance(value, Mapping) and {*value} == {"at", "values"}


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {value_text(v)}" for k, v in values.items())


def _abouts(states: Mapping[str, StepState]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for step, state in states.items():
        if "about" in state.data:
            yield step, state.data["about"]


def measured_table(found: Iterable[tuple[str, Measured]]) -> Table:
    """Evaluations as rows."""
    found = list(found)
    shown = columns(one for _, one in found)
    made = Table("measured", "on", box=None, pad_edge=False, header_style="bold")
    for name in ("documents", *shown):
        made.add_column(name.replace("_", " "), justify="right")
    for step, one in found:
        made.add_row(step, *cells(one, shown))
    return made


def columns(found: Iterable[Measured]) -> tuple[str, ...]:
    """The measures that a table of these evaluations has: some always, others where there are any."""
    there = {name for one in found for name in one.values}
    return tuple(m for m in MEASURES if m in ALWAYS or m in there)


def cells(one: Measured, shown: Sequence[str]) -> list[str]:
    """An evaluation as a table has it: the set, its documents, and each of the measures that there is."""
    values = [f"{one.values[m]:.4g}" if m in one.values else "" for m in shown]
    return [one.on, str(one.documents), *values]
