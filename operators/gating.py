"""The verb `gate`: lets a model pass only if it is better where it has to be, and not by chance."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lfm.errors import LfmError, UnknownName
from lfm.method import FIELDS
from lfm.significance import Difference, NotComparable, paired_bootstrap
from operators.artifact import Metrics, Model
from operators.base import operator
from operators.data.records import check_types
from operators.data.row_files import DatasetError
from operators.measures.edit_scores import EditMeasure
from operators.measures.measure import DOCUMENTS, SUMMARY
from operators.workspace import Workspace

Measure = Literal["loss", "exact_match", "chrf", "accuracy", EditMeasure, "score", "barrier"]
LOWER = ("loss", "divergence", "barrier")  # better when lower
WHOLE = ("score", "barrier")  # of a set, of which no document has its own
GENERATED = ("exact_match", "chrf", "fluency")  # depend on how many tokens an answer may have


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirement:
    """One comparison on one held-out set, or on the facts that a model carries.

    Attributes:
        better: The result that has to be better.
        than: The one it is compared with; or a number that the mean itself has to reach. Facts that were edited are
            all that there are and no sample of more, so a number is compared without an interval.
        on: The set.
        measure: ``loss``, ``divergence`` and ``barrier`` have to be lower, all others higher. ``score`` and ``barrier``
            are no document's own and can only reach a number.
    """

    # Also of an object that Python gives: its 1 is the 1.0 that YAML's becomes, and has the same fingerprint.
    __pydantic_config__ = FIELDS

    better: str
    than: str | float
    on: str
    measure: Measure = "loss"

    @property
    def names(self) -> tuple[str, ...]:
        """The results that it looks at."""
        return tuple(dict.fromkeys(n for n in (self.better, self.than) if isinstance(n, str)))


class GateClosed(LfmError, RuntimeError):
    """A model that is not better where it has to be."""

    def __init__(self, failed: Sequence[str]) -> None:
        super().__init__(failed)
        self.failed = failed

    def __str__(self) -> str:
        return f"gate closed: {'; '.join(self.failed)}. Train longer or lower what is required."


def _foreseen(
    *, results: Mapping[str, Metrics | None], require: Sequence[Requirement], **others: object
) -> Iterator[str]:
    if not require:
        yield "gate: require is empty, expected at least one comparison. Write it as {better: a, than: b, on: set}."
    for requirement in require:
        if requirement.better == requirement.than:
            yield f"gate: {requirement.better!r} has to be better than itself, expected another result. Name one."
        if (of := requirement.measure) in WHOLE and isinstance(requirement.than, str):
            yield f"gate: {of} is compared with {requirement.than!r}, expected a number: it is of a set. Give one."
        for name in requirement.names:
            try:
                _looked_up(name, requirement, results)
            except LfmError as problem:
                yield f"gate: {problem}"


@operator(problems=_foreseen, takes_ensembles=("model",), hands_on="model")
def gate(work: Workspace, *, model: Model, results: Mapping[str, Metrics], require: Sequence[Requirement]) -> Model:
    """Hand `model` on if every requirement holds: with a 95 % interval that excludes 0, or with a mean that is reached.

    Args:
        work: The step's workspace.
        model: What is let through, unchanged; what was found is in its ``about``.
        results: Evaluations by name, on the same documents.
        require: What has to hold.

    Raises:
        GateClosed: With every requirement that does not.
        NotComparable: Two results are not of the same documents, or of too few.
        UnknownName: A requirement names what was not measured.
    """
    found = [(r, compared(r, results)) for r in require]
    failed = [said(r, d) for r, d in found if not holds(r, d)]
    for done, (requirement, difference) in enumerate(found, 1):
        fine = holds(requirement, difference)
        print(f"{'holds' if fine else 'FAILS'}: {said(requirement, difference)}")
        work.progress(done, len(found), **asdict(difference), holds=float(fine))
    if failed:
        raise GateClosed(failed)
    report = [{**asdict(r), **asdict(d), "said": said(r, d)} for r, d in found]
    return replace(model, about={**model.about, "gate": report})


def compared(requirement: Requirement, results: Mapping[str, Metrics]) -> Difference:
    """`better` minus `than`: paired by document, or the mean minus the number, which has no interval.

    Raises:
        NotComparable: They were not measured on the same documents in the same way.
        UnknownName: One of them was not measured.
    """
    if not isinstance(requirement.than, str):
        gap = _looked_up(requirement.better, requirement, results)[requirement.measure] - requirement.than
        return Difference(mean=gap, low=gap, high=gap)
    names = requirement.better, requirement.than
    one, other = (_looked_up(name, requirement, results) for name in names)
    pair = f"{names[0]!r} and {names[1]!r} on {requirement.on!r}"
    if one["digest"] != other["digest"]:
        fix = "Evaluate both on the same data, with the same max_documents."
        raise NotComparable(f"{pair} were measured on different documents", "the same ones", fix)
    if requirement.measure in GENERATED and one["generate"] != other["generate"]:
        what = f"{pair} answered with up to {one['generate']} and {other['generate']} tokens"
        raise NotComparable(what, "the same number", "Evaluate both with the same generate.")
    if requirement.measure in WHOLE:
        what = f"{pair} have one {requirement.measure} each, and no document has its own"
        raise NotComparable(what, "a measure of each document, or a number", "Give one.")
    mine, theirs = (documents_of(results[name], requirement.on) for name in names)
    if requirement.measure == "loss":
        if mine["tokens"] != theirs["tokens"]:
            fix = "Use models with the same tokenizer, and the same length."
            raise NotComparable(f"{pair} have losses of other tokens", "the same ones", fix)
        return paired_bootstrap(np.array(mine["loss"]), np.array(theirs["loss"]), np.array(mine["tokens"], np.float64))
    # A fact that does not say what a measure takes has none in both, and weighs nothing.
    pairs = list(zip(mine[requirement.measure], theirs[requirement.measure], strict=True))
    weights = np.array([float(None not in pair) for pair in pairs])
    values = np.array([(0.0, 0.0) if None in pair else pair for pair in pairs])
    return paired_bootstrap(values[:, 0], values[:, 1], weights)


def _looked_up(name: str, requirement: Requirement, results: Mapping[str, Metrics | None]) -> dict[str, Any]:
    """What a result says of a requirement's set; nothing where it is not here yet."""
    if name not in results:
        raise UnknownName("result", name, tuple(results))
    result = results[name]
    if result is None:
        return {}
    if not (result.path / SUMMARY).is_file():
        fix = "Give what evaluate or barrier made."
        raise DatasetError(str(result.path), f"holds no {SUMMARY}, expected the result of an evaluation", fix)
    said = json.loads((result.path / SUMMARY).read_text())
    if requirement.on not in said["sets"]:
        raise UnknownName(f"set of {name!r}", requirement.on, tuple(said["sets"]))
    found = said["sets"][requirement.on]
    if requirement.measure not in found:
        measures = tuple(m for m in get_args(Measure) if m in found)
        raise UnknownName(f"measure of {name!r} on {requirement.on!r}", requirement.measure, measures)
    return {**found, "generate": said["generate"]}


def documents_of(result: Metrics, on: str) -> dict[str, list[Any]]:
    """The columns of an evaluation's documents of one set.

    Raises:
        DatasetError: They are of types that no evaluation writes.
    """
    path = result.path / DOCUMENTS
    check_types(path, pq.read_schema(path))
    table = pq.read_table(path)
    return dict(table.filter(pc.equal(table["set"], on)).to_pydict())


def holds(requirement: Requirement, difference: Difference) -> bool:
    """Whether the whole interval lies on the better side; a number is reached by what is equal to it."""
    lower = requirement.measure in LOWER
    if not isinstance(requirement.than, str):
        return difference.mean <= 0 if lower else difference.mean >= 0
    return difference.high < 0 if lower else difference.low > 0


def said(requirement: Requirement, difference: Difference) -> str:
    """The comparison as a clause."""
    one = f"{requirement.measure} of {requirement.better}"
    if not isinstance(requirement.than, str):
        bound = f"{'at most' if requirement.measure in LOWER else 'at least'} {requirement.than:g}"
        return f"{one} on {requirement.on} is {requirement.than + difference.mean:.4f}, where {bound} is required"
    return (
        f"{one} minus {requirement.than} on {requirement.on} is "
        f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    )
