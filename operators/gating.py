"""The verb `gate`: lets a model pass only if it is better where it has to be, and not by chance."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lfm.errors import LfmError
from lfm.significance import Difference, paired_bootstrap
from operators.artifact import Metrics, Model
from operators.base import operator
from operators.evaluation import DOCUMENTS
from operators.workspace import Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """One comparison on one held-out set.

    Attributes:
        better: The result that has to be better.
        than: The one it is compared with.
        on: The set.
        measure: ``loss`` has to be lower, ``exact_match`` and ``chrf`` higher.
    """

    better: str
    than: str
    on: str
    measure: Literal["loss", "exact_match", "chrf"] = "loss"


class GateClosed(LfmError, RuntimeError):
    """A model that is not better where it has to be."""

    def __init__(self, failed: Sequence[str]) -> None:
        super().__init__(failed)
        self.failed = failed

    def __str__(self) -> str:
        return f"gate closed: {'; '.join(self.failed)}. Train longer or lower what is required."


class NoSuchResult(LfmError, LookupError):
    """A requirement about something that was not measured."""

    def __init__(self, what: str, known: Sequence[str]) -> None:
        super().__init__(what, known)
        self.what, self.known = what, known

    def __str__(self) -> str:
        return f"require: {self.what} was not measured, expected one of {', '.join(self.known)}."


@operator()
def gate(work: Workspace, *, model: Model, results: Mapping[str, Metrics], require: Sequence[Requirement]) -> Model:
    """Hand `model` on if every requirement holds with a 95 % interval that excludes 0.

    Args:
        work: The step's workspace.
        model: What is let through, unchanged; what was found is in its ``about``.
        results: Evaluations by name, on the same documents.
        require: What has to hold.

    Raises:
        GateClosed: With every requirement that does not.
        NoSuchResult: A requirement names what `results` do not have.
    """
    found = [(r, compared(r, results)) for r in require]
    failed = [said(r, d) for r, d in found if not holds(r, d)]
    for requirement, difference in found:
        print(f"{'holds' if holds(requirement, difference) else 'FAILS'}: {said(requirement, difference)}")
    if failed:
        raise GateClosed(failed)
    report = [{**asdict(r), **asdict(d)} for r, d in found]
    return replace(model, about={**model.about, "gate": report})


def compared(requirement: Requirement, results: Mapping[str, Metrics]) -> Difference:
    """`better` minus `than`, paired by document."""
    one, weights = column(requirement.better, requirement, results)
    other, _ = column(requirement.than, requirement, results)
    return paired_bootstrap(one, other, weights)


def column(
    name: str, requirement: Requirement, results: Mapping[str, Metrics]
) -> "tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]]":
    """A result's values on one set, document by document, and their weights."""
    if name not in results:
        raise NoSuchResult(name, tuple(results))
    table = pq.read_table(results[name].path / DOCUMENTS)
    rows = table.filter(pc.equal(table["set"], requirement.on))
    if not rows.num_rows or requirement.measure not in rows.column_names:
        measured = sorted(set(table["set"].to_pylist()))
        raise NoSuchResult(f"{requirement.measure} of {name} on {requirement.on}", measured)
    values = rows[requirement.measure].to_numpy()
    return values, rows["tokens"].to_numpy() if requirement.measure == "loss" else np.ones(len(values))


def holds(requirement: Requirement, difference: Difference) -> bool:
    """Whether the whole interval lies on the better side."""
    return difference.high < 0 if requirement.measure == "loss" else difference.low > 0


def said(requirement: Requirement, difference: Difference) -> str:
    """The comparison as a clause."""
    return (
        f"{requirement.measure} of {requirement.better} minus {requirement.than} on {requirement.on} is "
        f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    )
