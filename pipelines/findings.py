"""States -> what a run found: evaluations, comparisons, endpoints."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from pipelines.lineage import StepState


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one step measured on one held-out set."""

    step: str
    on: str
    documents: int
    values: Mapping[str, float]


def measurements(states: Mapping[str, StepState]) -> list[Measured]:
    """Every evaluation of a run, in the order of its steps."""
    found = []
    for step, about in _abouts(states):
        for name, values in about.get("sets", {}).items():
            plain = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and k != "documents"}
            found.append(Measured(step=step, on=name, documents=int(values["documents"]), values=plain))
    return found


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


def measured_table(found: list[Measured]) -> Table:
    """Evaluations as rows."""
    columns = ("loss", "perplexity", "exact_match", "chrf")
    made = Table("measured", "on", box=None, pad_edge=False, header_style="bold")
    for name in ("documents", *columns):
        made.add_column(name.replace("_", " "), justify="right")
    for one in found:
        cells = [f"{one.values[c]:.4g}" if c in one.values else "" for c in columns]
        made.add_row(one.step, one.on, str(one.documents), *cells)
    return made
