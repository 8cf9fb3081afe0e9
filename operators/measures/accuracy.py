"""How often a classifier tells the right label, document by document."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from operators.data.batches import IGNORED, on_device
from operators.data.rows import Form, digest_of
from operators.models.classifiers import check, labels_of, load_tokenizer, numbered, rows_of, told_of
from operators.models.objectives import plain
from operators.models.texts import check_length, longest_row


class Labels:
    """What the right label costs a classifier, and how often it is the likeliest one to it."""

    forms = (Form.LABELLED,)

    def __init__(self, model: Any, home: Path, *, length: int, batch_size: int) -> None:
        self.model, self.labels, self.tokenizer = model, labels_of(home), load_tokenizer(home)
        self.length, self.batch_size = length, batch_size
        check(plain(model), self.tokenizer)
        check_length("evaluate", length, longest_row(home))

    def work(self, rows: Mapping[str, Sequence[Any]]) -> int:
        """See `operators.evaluation.Measure`."""
        return len(rows["label"])

    def digest(self, rows: Mapping[str, Sequence[Any]]) -> str:
        """See `operators.evaluation.Measure`."""
        return digest_of(rows)

    @torch.inference_mode()
    def measured(
        self, name: str, rows: Mapping[str, Sequence[Any]], told: Callable[..., None]
    ) -> tuple[dict[str, list[Any]], dict[str, float]]:
        """See `operators.evaluation.Measure`."""
        numbers = numbered(rows["label"], self.labels, name)
        found = rows_of(rows["text"], numbers, self.tokenizer, self.length)
        # Rows of a batch are alike in length.
        order = np.argsort((found.targets != IGNORED).argmax(axis=1), kind="stable")
        losses, said = np.zeros(len(found)), np.zeros(len(found), np.int64)
        device = next(self.model.parameters()).device
        for start in range(0, len(found), self.batch_size):
            where = order[start : start + self.batch_size]
            logits, right = told_of(self.model, on_device(found, where, device))
            each = nn.functional.cross_entropy(logits.float(), right, reduction="none")
            losses[where], said[where] = each.double().cpu().numpy(), logits.argmax(dim=1).cpu().numpy()
        right_ones = (said == np.array(numbers)).astype(np.float64)
        columns = {
            "loss": losses.tolist(),
            "tokens": [1] * len(found),
            "answer": [self.labels[i] for i in said],
            "accuracy": right_ones.tolist(),
        }
        means = {"loss": float(losses.mean()), "accuracy": float(right_ones.mean())}
        told(len(found), **{f"{name}_{k}": v for k, v in means.items()})
        return columns, means
