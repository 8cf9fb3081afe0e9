"""Text without labels: what a method that follows a gradient on it looks at, and how a step takes some of each set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from lfm.chunks import chunked
from operators.artifact import Dataset, Model
from operators.data.batches import Batch, Rows, documents, global_batch, packed
from operators.data.rows import Form, read_rows
from operators.learning.loop import Where
from operators.models import classifiers
from operators.models.language_models import architecture_of, check, load_tokenizer
from operators.models.objectives import Objective, answers
from operators.models.texts import unfit
from operators.training import Training

Told = Callable[[Float[Tensor, "rows classes"]], Float[Tensor, "rows"]]
"""What is made small: a number for each row, or for each position of a text, from a model's logits."""


class Followed(Protocol):
    """A method that follows such a gradient."""

    steps: int
    learning_rate: float
    batch_size: int


def unsuited(base: Model | None, data: Mapping[str, Dataset | None], length: int) -> Iterator[str]:
    """What headers tell against learning from these data, a clause each; what is None cannot be looked at yet."""
    if length < 2:
        yield f"length={length}, expected length >= 2. It counts the tokens of a row."
        return
    what = None if base is None else architecture_of(base.path)
    if base is not None and what == "encoder":
        yield f"base: {str(base.path)!r} is an encoder: {classifiers.HEADLESS}. {classifiers.GIVE_HEAD}"
    named = {f"data {name!r}": dataset for name, dataset in data.items()}
    forms = (Form.TEXT,) if what == "decoder" else (Form.TEXT, Form.LABELLED)
    yield from unfit(Training(length=length), None if base is None else base.path, named, forms)


def training_of(method: Followed, *, num_sets: int, length: int, seed: int) -> Training:
    """How such a method trains: its rate stays as it is, and nothing is clipped."""
    return Training(
        max_steps=method.steps,
        batch_size=method.batch_size * num_sets,
        micro_batch_size=method.batch_size,
        length=length,
        packing=False,
        learning_rate=method.learning_rate,
        schedule="constant",
        warmup=0.0,
        clip_norm=None,
        seed=seed,
    )


def looking(
    model: Any, base: Model, told: Told, data: Mapping[str, Dataset], length: int
) -> tuple[nn.Module, list[Rows]]:
    """The objective of a model, whatever it tells, and the rows of each set.

    Args:
        model: A classifier or a language model.
        base: The folder with its tokenizer.
        told: What is made small.
        data: Sets by name; labels are not read.
        length: Tokens of a row; what is longer loses its end, or is cut where it is a language model's.

    Raises:
        UnsupportedModel: The model cannot be trained here.
    """
    if architecture_of(base.path) == "classifier":
        tokenizer = classifiers.load_tokenizer(base.path)
        classifiers.check(model, tokenizer)
        return OfLabels(model, told), [_texts(dataset, tokenizer, length) for dataset in data.values()]
    tokenizer = load_tokenizer(base.path)
    check(model, packed=False)
    return OfTokens(model, told), [_documents(dataset, tokenizer, length) for dataset in data.values()]


class OfLabels(nn.Module):
    """What is made small, of what a classifier tells of texts."""

    def __init__(self, model: Any, told: Told) -> None:
        super().__init__()
        self.model, self.told = model, told

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's texts."""
        logits, _ = classifiers.told_of(self.model, batch)
        return self.told(logits.float()).sum()


class OfTokens(Objective):
    """What is made small, of what a language model tells of the next token at each position."""

    def __init__(self, model: Any, told: Told) -> None:
        super().__init__(model, packed=False)
        self.told = told

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's positions, without holding the logits of all of them."""
        hidden, _ = answers(self.model, batch, packed=False)
        head = self.head[0]

        def told(logits: Tensor, where: slice) -> Tensor:
            return self.told(head.shaped(logits.float())).sum()

        return chunked(hidden, head.linear.weight, head.linear.bias, told)


class Balanced:
    """As many rows of each set at every step, in an order of its own.

    Attributes:
        rows: Those of all sets, one after another.
    """

    def __init__(self, sets: Sequence[Rows], batch_size: int, seed: int) -> None:
        self.rows = _together(sets)
        self.sizes = [len(rows) for rows in sets]
        self.batch_size, self.seed = batch_size, seed

    def __call__(self, step: int, where: Where) -> tuple[Rows, Where]:
        """See `Job.rewrite`."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        taken = [
            start + global_batch(size, step, self.batch_size, self.seed)
            for start, size in zip(starts, self.sizes, strict=True)
        ]
        return self.rows, np.concatenate(taken)


def _texts(dataset: Dataset, tokenizer: Any, length: int) -> Rows:
    texts = read_rows(dataset, forms=(Form.TEXT, Form.LABELLED))["text"].to_pylist()
    return classifiers.rows_of(texts, [0] * len(texts), tokenizer, length)


def _documents(dataset: Dataset, tokenizer: Any, length: int) -> Rows:
    found = documents(read_rows(dataset, forms=(Form.TEXT,)).to_pydict(), tokenizer)
    return packed(found, length=length, padding=tokenizer.pad_token_id, packing=False, where=dataset.uri)


def _together(sets: Sequence[Rows]) -> Rows:
    """The rows of one set after those of another."""
    ids, positions, targets = (
        np.concatenate([getattr(rows, field) for rows in sets]) for field in ("ids", "positions", "targets")
    )
    return Rows(ids, positions, targets, sum(r.cut for r in sets), sum(r.left_out for r in sets))
