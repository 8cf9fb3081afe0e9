"""What steps noted -> what was found: evaluations, comparisons, endpoints."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from pipelines.lineage import StepState

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
