"""The verb `tune`: a model, or a small part added to it, learns from data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfm.rewriting import Rewrite
from lfm.tuning.base import Tune
from operators.artifact import Adapter, Dataset, Model, kind_of
from operators.base import operator
from operators.data.batches import Rows
from operators.data.facts import carry
from operators.footprint import Footprint
from operators.learning.image_job import image_job
from operators.learning.loop import Job, Place
from operators.learning.memory import trained
from operators.learning.trainer import fit, refused
from operators.learning.zero import lent, partitioned, shaped
from operators.models import classifiers, networks
from operators.models.classifiers import GIVE_HEAD, HEADLESS
from operators.models.language_models import (
    DTYPES,
    UnsupportedModel,
    architecture_of,
    check,
    config_of,
    inject,
    load,
    load_tokenizer,
    save,
    sketch,
    stored_dtype,
)
from operators.models.networks import unsplittable
from operators.models.objectives import NextToken
from operators.models.rewrites import name_of, write
from operators.models.texts import packed_rows, unfit
from operators.needs import unmet
from operators.resources import Resources
from operators.training import Training
from operators.workspace import Workspace


def _foreseen(
    *,
    model: Model | None,
    data: Dataset | None,
    held_out: Dataset | None,
    method: Tune,
    training: Training,
    resources: Resources,
    **_: object,
) -> Iterator[str]:
    yield from refused(training, resources, method)
    if isinstance(method, Rewrite) and name_of(method) is None:
        fix = "What it puts into a model has to be put in again by whoever loads it: add it to lfm/."
        yield f"method: {type(method).__name__} rewrites the model, expected a method of this project for that. {fix}"
    yield from unfit(training, None if model is None else model.path, {"data": data, "held_out": held_out})
    if model is not None:
        what = architecture_of(model.path)
        becomes = what if what in ("decoder", "network") else "classifier"
        yield from unmet(method, architectures=[becomes], called="model")
        if what == "network":
            yield from unsplittable(networks.network_of(model.path), training, resources)
            if method.gives == kind_of(Adapter) or isinstance(method, Rewrite):
                name = type(method).__name__
                yield f"{name}: 'network' under model, expected a model of texts to add to. Choose full."
        if what == "encoder" and method.gives == kind_of(Adapter):
            yield f"model: {str(model.path)!r} is an encoder: {HEADLESS}. {GIVE_HEAD}"


def _footprint(
    *,
    model: Model | None,
    data: Dataset | None,
    method: Tune,
    training: Training,
    resources: Resources,
    **_: object,
) -> Footprint | None:
    """What it takes; None where it is not known yet what learns: a model, or how many labels a head tells."""
    if model is None or (what := architecture_of(model.path)) == "network" or (what == "encoder" and data is None):
        return None
    labels = (
        classifiers.labels_in(data) if what == "encoder" and data is not None else classifiers.labels_of(model.path)
    )

    def make(layers: int | None) -> tuple[nn.Module]:
        base = sketch(model.path, dtype_of(method, training), layers=layers, labels=len(labels))
        whole = ready(attached(base, method, labelled=bool(labels)), base, training)
        return (classifiers.LabelLoss(whole) if labels else NextToken(whole, packed=training.packing),)

    return trained(
        make, [config_of(model.path)], training, resources, what=f"{method} {len(labels)}", labelled=bool(labels)
    )


@operator(problems=_foreseen, footprint=_footprint, like="model")
def tune(
    work: Workspace,
    *,
    model: Model,
    data: Dataset,
    held_out: Dataset | None = None,
    method: Tune,
    training: Training,
) -> Model | Adapter:
    """Train a language model on text or on the answers of pairs and conversations, or what tells labels on these.

    Args:
        work: The step's workspace.
        model: Where it starts. An encoder becomes a classifier of the labels of `data`, sorted, by the head that
            transformers has for its type; a classifier keeps its labels, and so does a network for images.
        data: What it learns from.
        held_out: What it is looked at with while it trains.
        method: Which weights learn; it decides whether the result is a model or an adapter.
        training: How it is trained; a classifier's rows are not packed.

    Raises:
        UnsupportedModel: The model cannot be trained so.
        UnknownName: A label is none of the classifier's.
        NoLossToken: There is nothing to learn in `data`.
    """
    arguments = {"model": model, "data": data, "held_out": held_out, "method": method, "training": training}
    folder, measures = fit(work, _job, arguments, training)
    carry([model.path], folder)
    if method.gives == kind_of(Adapter):
        return work.save(Adapter, folder, {"base": model.digest, **measures})
    return work.save(Model, folder, measures)


def _job(
    place: Place, *, model: Model, data: Dataset, held_out: Dataset | None, method: Tune, training: Training
) -> Job:
    if architecture_of(model.path) == "network":
        network = networks.load(model.path).requires_grad_(False)
        method.attach(network, _nothing_added)
        frozen = method.gives == kind_of(Model)
        return image_job(network, networks.labels_of(model.path), data, held_out, needs_frozen=frozen)
    labels = _labels(model, data, method)
    whole = learner(model.path, method, training, place, labels)
    rows: Callable[[Dataset], Rows]
    if labels:
        tokenizer = classifiers.load_tokenizer(model.path)
        rows = partial(classifiers.labelled_rows, tokenizer=tokenizer, labels=labels, training=training)
    else:
        rows = partial(packed_rows, tokenizer=load_tokenizer(model.path), training=training)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        named = {n.removeprefix("model."): w for n, w in weights.items()}
        if isinstance(method, Rewrite):
            write(folder, method, method.export(whole, named), base=model.digest)
            return
        save(whole, named, folder, tokenizer=model.path, dtype=stored_dtype(model.path))

    return Job(
        objective=classifiers.LabelLoss(whole) if labels else NextToken(whole, packed=training.packing),
        rows=rows(data),
        held_out=None if held_out is None else rows(held_out),
        export=export,
        needs_frozen=method.gives == kind_of(Model),
    )


def _nothing_added(kind: str, **_: Any) -> None:
    raise UnsupportedModel("network", f"PEFT adds no {kind} to it", "Choose full.")


def _labels(model: Model, data: Dataset, method: Tune) -> tuple[str, ...]:
    """What a classifier tells, an encoder will tell; nothing of a language model."""
    what = architecture_of(model.path)
    if what == "encoder" and method.gives == kind_of(Adapter):
        raise UnsupportedModel("encoder", HEADLESS, GIVE_HEAD)  # an adapter's base has to know the labels
    return classifiers.labels_in(data) if what == "encoder" else classifiers.labels_of(model.path)


def learner(folder: Path, method: Tune, training: Training, place: Place, labels: Sequence[str] = ()) -> Any:
    """The model in `folder` as `method` trains it: what learns is float32, what does not has `precision`.

    What is drawn at the start depends on the seed alone, wherever it trains.

    Args:
        folder: The model's.
        method: Which weights learn.
        training: How.
        place: Where.
        labels: A classifier's, which it is loaded as; none for a language model.
    """
    dtype = dtype_of(method, training)
    torch.manual_seed(training.seed)
    with partitioned(place, training, dtype):
        base = classifiers.load(folder, dtype, labels) if labels else load(folder, dtype)
    with lent(base):
        if labels:
            classifiers.check(base, classifiers.load_tokenizer(folder))
        else:
            check(base, packed=training.packing)
    torch.manual_seed(training.seed)
    # What PEFT copies of a taken-apart model has to stay that way; what this project puts in asks for shapes.
    with lent(base), shaped(base) if isinstance(method, Rewrite) else nullcontext():
        whole = attached(base, method, labelled=bool(labels))
    return ready(whole, base, training)


def dtype_of(method: Tune, training: Training) -> torch.dtype:
    """In what a model is loaded that a method trains."""
    return torch.float32 if method.gives == kind_of(Model) else DTYPES[training.precision]


def attached(base: Any, method: Tune, *, labelled: bool = False) -> Any:
    """A model of which exactly that learns what `method` says; `base` is changed in place."""
    added: list[Any] = []

    def add(kind: str, **fields: Any) -> None:
        added.append(classifiers.add(base, kind, fields) if labelled else inject(base, kind, fields))

    base.requires_grad_(False)
    method.attach(base, add)
    return added[0] if added else base


def ready(whole: Any, base: Any, training: Training) -> Any:
    """The same in float32 where it learns, with the checkpoints that the training asks for."""
    if training.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in whole.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return whole
