"""How often a classifier of texts or a network for images tells the right label, document by document."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lfm.networks import ImageNetwork
from operators.artifact import Dataset
from operators.data.batches import IGNORED, Batch, Rows, on_device
from operators.data.classes import numbered
from operators.data.images import Images, image_rows, read_images
from operators.data.rows import Form, digest_of, read_rows
from operators.models import networks
from operators.models.classifiers import check, labels_of, load_tokenizer, rows_of, told_of
from operators.models.objectives import plain
from operators.models.texts import check_length, longest_row


class Labels(ABC):
    """What the right label costs a model, and how often it is the likeliest one to it.

    Attributes:
        model: Who is asked.
        labels: What it tells, in the order of its logits.
        batch_size: Rows at once.
    """

    def __init__(self, model: Any, labels: Sequence[str], batch_size: int) -> None:
        self.model, self.labels, self.batch_size = model, labels, batch_size

    @abstractmethod
    def read(self, dataset: Dataset, max_documents: int | None) -> Any:
        """A set's documents, only so many."""

    @abstractmethod
    def digest(self, rows: Any) -> str:
        """See `operators.measures.measure.Measure`."""

    @abstractmethod
    def rows(self, name: str, rows: Any) -> Rows:
        """A row for each document, whose one target is the number of its label."""

    @abstractmethod
    def told(self, batch: Batch) -> tuple[Float[Tensor, "documents labels"], Int[Tensor, "documents"]]:
        """The model's logits, and the right labels' numbers."""

    @abstractmethod
    def work(self, rows: Any) -> int:
        """See `operators.measures.measure.Measure`."""

    @torch.inference_mode()
    def measured(
        self, name: str, rows: Any, told: Callable[..., None]
    ) -> tuple[dict[str, list[Any]], dict[str, float]]:
        """See `operators.measures.measure.Measure`."""
        found = self.rows(name, rows)
        # Rows of a batch are alike in length.
        order = np.argsort((found.targets != IGNORED).argmax(axis=1), kind="stable")
        losses, said = np.zeros(len(found)), np.zeros(len(found), np.int64)
        device = next(self.model.parameters()).device
        for start in range(0, len(found), self.batch_size):
            where = order[start : start + self.batch_size]
            logits, right = self.told(on_device(found, where, device))
            each = nn.functional.cross_entropy(logits.float(), right, reduction="none")
            losses[where], said[where] = each.double().cpu().numpy(), logits.argmax(dim=1).cpu().numpy()
        right_ones = (said == found.targets.max(axis=1)).astype(np.float64)
        columns = {
            "loss": losses.tolist(),
            "tokens": [1] * len(found),
            "answer": [self.labels[int(i)] for i in said],
            "accuracy": right_ones.tolist(),
        }
        means = {"loss": float(losses.mean()), "accuracy": float(right_ones.mean())}
        told(len(found), **{f"{name}_{k}": v for k, v in means.items()})
        return columns, means


class OfTexts(Labels):
    """Of a classifier of texts."""

    def __init__(self, model: Any, home: Path, *, length: int, batch_size: int) -> None:
        super().__init__(model, labels_of(home), batch_size)
        self.tokenizer, self.length = load_tokenizer(home), length
        check(plain(model), self.tokenizer)
        check_length("evaluate", length, longest_row(home))

    @override
    def read(self, dataset: Dataset, max_documents: int | None) -> Mapping[str, Sequence[Any]]:
        table = read_rows(dataset, forms=(Form.LABELLED,)).slice(0, max_documents)
        return dict(table.to_pydict())

    @override
    def work(self, rows: Mapping[str, Sequence[Any]]) -> int:
        return len(rows["label"])

    @override
    def digest(self, rows: Mapping[str, Sequence[Any]]) -> str:
        return digest_of(rows)

    @override
    def rows(self, name: str, rows: Mapping[str, Sequence[Any]]) -> Rows:
        return rows_of(rows["text"], numbered(rows["label"], self.labels, name), self.tokenizer, self.length)

    @override
    def told(self, batch: Batch) -> tuple[Float[Tensor, "documents labels"], Int[Tensor, "documents"]]:
        return told_of(self.model, batch)


class OfImages(Labels):
    """Of a network for images."""

    model: ImageNetwork

    def __init__(self, model: ImageNetwork, home: Path, *, batch_size: int) -> None:
        super().__init__(model, networks.labels_of(home), batch_size)

    @override
    def read(self, dataset: Dataset, max_documents: int | None) -> Images:
        return networks.fitting(read_images(dataset).first(max_documents), self.model.shape, dataset.uri)

    @override
    def work(self, rows: Images) -> int:
        return len(rows)

    @override
    def digest(self, rows: Images) -> str:
        return rows.digest

    @override
    def rows(self, name: str, rows: Images) -> Rows:
        return image_rows(rows, numbered(rows.labels, self.labels, name))

    @override
    def told(self, batch: Batch) -> tuple[Float[Tensor, "documents labels"], Int[Tensor, "documents"]]:
        features, right = networks.seen(self.model, batch)
        return self.model.head(features), right


def labels_told(model: Any, home: Path, *, length: int, batch_size: int) -> Labels:
    """What measures a classifier of texts, whose rows have `length` tokens, or a network for images."""
    if isinstance(model, ImageNetwork):
        return OfImages(model, home, batch_size=batch_size)
    return OfTexts(model, home, length=length, batch_size=batch_size)
