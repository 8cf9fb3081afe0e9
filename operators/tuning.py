"""The verb `tune`: a model, or a small part added to it, learns from data."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfm.tuning.base import Tune
from operators.artifact import Adapter, Dataset, Model, kind_of
from operators.base import operator
from operators.language_models import DTYPES, check, inject, load, load_tokenizer, save, stored_dtype
from operators.loop import Job, Place
from operators.objectives import NextToken
from operators.resources import Resources
from operators.texts import packed_rows, unfit
from operators.trainer import fit, refused
from operators.training import Training
from operators.workspace import Workspace
from operators.zero import lent, partitioned


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
    yield from refused(training, resources)
    yield from unfit(training, None if model is None else model.path, {"data": data, "held_out": held_out})


@operator(problems=_foreseen)
def tune(
    work: Workspace,
    *,
    model: Model,
    data: Dataset,
    held_out: Dataset | None = None,
    method: Tune,
    training: Training,
) -> Model | Adapter:
    """Train a model on text, or on the answers of pairs and conversations.

    Args:
        work: The step's workspace.
        model: Where it starts.
        data: What it learns from.
        held_out: What it is looked at with while it trains.
        method: Which weights learn; it decides whether the result is a model or an adapter.
        training: How it is trained.
    """
    arguments = {"model": model, "data": data, "held_out": held_out, "method": method, "training": training}
    folder, measures = fit(work, _job, arguments, training)
    if method.gives == kind_of(Adapter):
        return work.save(Adapter, folder, {"base": model.digest, **measures})
    return work.save(Model, folder, measures)


def _job(
    place: Place, *, model: Model, data: Dataset, held_out: Dataset | None, method: Tune, training: Training
) -> Job:
    tokenizer = load_tokenizer(model.path)
    whole = learner(model.path, method, training, place)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        named = {n.removeprefix("model."): w for n, w in weights.items()}
        save(whole, named, folder, tokenizer=model.path, dtype=stored_dtype(model.path))

    return Job(
        objective=NextToken(whole, packed=training.packing),
        rows=packed_rows(data, tokenizer, training),
        held_out=None if held_out is None else packed_rows(held_out, tokenizer, training),
        export=export,
        needs_frozen=method.gives == kind_of(Model),
    )


def learner(folder: Path, method: Tune, training: Training, place: Place) -> Any:
    """The model in `folder` as `method` trains it: what learns is float32, what does not has `precision`.

    What is drawn at the start depends on the seed alone, wherever it trains.
    """
    added: list[Any] = []

    def add(kind: str, **fields: Any) -> None:
        added.append(inject(base, kind, fields))

    dtype = torch.float32 if method.gives == "model" else DTYPES[training.precision]
    with partitioned(place, training, dtype):
        base = load(folder, dtype)
    with lent(base):
        check(base, packed=training.packing)
    base.requires_grad_(False)
    torch.manual_seed(training.seed)
    method.attach(base, add)
    if training.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    whole: nn.Module = added[0] if added else base
    for parameter in whole.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return whole
