"""The verb `barrier`: how far the loss rises on the straight way between two models."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lfm.alignment.base import at, barrier as height
from lfm.errors import HyperparameterError, LfmError
from lfm.recalibration import recalibrate
from operators.artifact import Dataset, Metrics, Model
from operators.base import operator
from operators.data.images import read_images
from operators.data.rows import Form
from operators.measures.accuracy import Labels, labels_told
from operators.measures.answers import Answers
from operators.measures.measure import SUMMARY
from operators.models import classifiers, networks
from operators.models.alike import other_tensors
from operators.models.changed_models import opened
from operators.models.language_models import architecture_of
from operators.models.texts import unfit
from operators.recalibration import asking
from operators.training import Training
from operators.workspace import Workspace

POINTS = "points.parquet"
SAME = "Give two models of one architecture."


class BarrierError(LfmError, ValueError):
    """Models between which there is no straight way, or no fair look at it, with the reasons, a clause each."""

    def __init__(self, clauses: tuple[str, ...]) -> None:
        super().__init__(clauses)
        self.clauses = clauses

    def __str__(self) -> str:
        return "\n".join(f"barrier: {clause}" for clause in self.clauses)


def _foreseen(
    *,
    ends: Sequence[Model | None],
    data: Mapping[str, Dataset | None],
    calibration: Dataset | None = None,
    kinds: Mapping[str, Sequence[object]],
    points: int = 25,
    length: int = 512,
    batch_size: int = 32,
    max_documents: int | None = None,
    **_: object,
) -> Iterator[str]:
    yield from map(str, _out_of_range(points, length, batch_size, max_documents))
    if not data:
        yield "barrier: data is empty, expected at least one set with a name. Write it as data: {name: set}."
    here = [end for end in ends if end is not None]
    try:
        yield from (f"barrier: {clause}" for clause in _unlike(ends, calibrated="calibration" in kinds))
    except LfmError as problem:
        yield str(problem)
    folder = here[0].path if here else None
    yield from unfit(Training(length=max(2, length)), folder, {f"data {name!r}": one for name, one in data.items()})
    yield from unfit(Training(), None, {"calibration": calibration}, (Form.IMAGE,))


def _unlike(ends: Sequence[Model | None], *, calibrated: bool) -> Iterator[str]:
    """Why there is no straight way between models, or none that can be looked at, as far as headers tell."""
    if len(ends) != 2:
        yield f"{len(ends)} models under ends, expected 2. Measure them pair by pair."
        return
    first, second = ends
    if first is not None and second is not None:
        yield from other_tensors(f"ends[1] {second.uri!r}", second.path, "ends[0]", first.path, SAME)
    end = first or second
    if end is None:
        return
    what = architecture_of(end.path)
    if what == "encoder":
        yield f"{end.uri!r} is an encoder: {classifiers.HEADLESS}. {classifiers.GIVE_HEAD}"
    normalised = what == "network" and networks.network_of(end.path).batchnorm
    if normalised and not calibrated:
        why = "What batch normalisation has seen fits at no point between the ends"
        yield f"no calibration, expected images. {why}: name those that it is measured on anew, as of training."
    if calibrated and not normalised:
        yield "calibration is given, expected none for models without batch normalisation. Leave it out."


def _out_of_range(
    points: int, length: int, batch_size: int, max_documents: int | None
) -> Iterator[HyperparameterError]:
    for holds, field, value, allowed in (
        (points >= 3, "points", points, "points >= 3, both ends among them"),
        (length >= 2, "length", length, "length >= 2"),
        (batch_size >= 1, "batch_size", batch_size, "batch_size >= 1"),
        (max_documents is None or max_documents >= 1, "max_documents", max_documents, "max_documents >= 1 or none"),
    ):
        if not holds:
            yield HyperparameterError("barrier", field, value, allowed)


@operator(problems=_foreseen)
def barrier(
    work: Workspace,
    *,
    ends: Sequence[Model],
    data: Mapping[str, Dataset],
    calibration: Dataset | None = None,
    points: int = 25,
    length: int = 512,
    batch_size: int = 32,
    max_documents: int | None = None,
) -> Metrics:
    """Measure the loss on the straight way between two models, and how far it rises above the line between its ends.

    For each set ``barrier`` is the largest difference, which is never below 0, and ``at`` where on the way it is,
    from 0 to 1. A barrier near 0 says that their weights can be averaged. The losses themselves, and what else
    `evaluate` measures of such models, are in ``points.parquet``.

    Args:
        work: The step's workspace.
        ends: Two models of one architecture.
        data: The sets by name.
        calibration: Images on which batch normalisation is measured anew at every point, the ends too, as `recalibrate`
            does it; needed by networks that have it, and by no others.
        points: How many points of the way are looked at, as far from each other; both ends are among them.
        length: Tokens of a row, where models read text.
        batch_size: Rows at once.
        max_documents: Only so many of each set, the first ones.

    Raises:
        HyperparameterError: A parameter is out of range.
        BarrierError: The models differ in more than the values of their tensors, or calibration lacks or is too much.
        DatasetError: Rows are not of a form that the models know.
        UnknownName: A label is none of the models'.
    """
    for problem in _out_of_range(points, length, batch_size, max_documents):
        raise problem
    if wrong := tuple(_unlike(ends, calibrated=calibration is not None)):
        raise BarrierError(wrong)
    (whole, home), (other, _) = (opened("barrier", end, None) for end in ends)
    models = [{n: v.clone() for n, v in model.state_dict().items()} for model in (whole, other)]
    whole.to(work.resources.device)
    measure: Labels | Answers
    if architecture_of(home) == "decoder":
        measure = Answers(whole, home, None, length=length, batch_size=batch_size, max_tokens=0)
    else:
        measure = labels_told(whole, home, length=length, batch_size=batch_size)
    sets = {name: measure.read(dataset, max_documents) for name, dataset in data.items()}
    ask = _calibrating(whole, calibration, batch_size)
    places = [number / (points - 1) for number in range(points)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sets}
    summary: dict[str, dict[str, Any]] = {}
    for number, t in enumerate(places):
        whole.load_state_dict(at(models, t))
        if ask is not None:
            recalibrate(whole, ask)
        for name, rows in sets.items():
            columns, means = measure.measured(name, rows, lambda *_, **__: None)
            found[name].append(means)
            summary[name] = {"documents": len(columns["loss"]), "digest": measure.digest(rows)}
        work.progress(number + 1, points, **{f"{name}_loss": every[-1]["loss"] for name, every in found.items()})
    for name, every in found.items():
        summary[name]["barrier"], summary[name]["at"] = height(places, [means["loss"] for means in every])
    folder = work.scratch / "metrics"
    folder.mkdir()
    about = {"sets": summary, "generate": 0, "points": points}
    (folder / SUMMARY).write_text(json.dumps(about, indent=2))
    table = [{"set": n, "t": t, **means} for n, every in found.items() for t, means in zip(places, every, strict=True)]
    pq.write_table(pa.Table.from_pylist(table), folder / POINTS)
    return work.save(Metrics, folder, about)


def _calibrating(model: Any, images: Dataset | None, batch_size: int) -> Callable[[], None] | None:
    """What asks a network about the images on which batch normalisation is measured."""
    if images is None:
        return None
    return asking(model, networks.fitting(read_images(images), model.shape, images.uri), batch_size)
