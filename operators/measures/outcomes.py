"""Rows -> what a model says of them: the one thing in which models differ when they are measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lfm.statistics import Outcomes
from operators.data.batches import IGNORED, Batch
from operators.models.classifiers import told_of
from operators.models.language_models import Architecture, Head, head_of
from operators.models.objectives import answers, cross_entropy


@dataclass(frozen=True, slots=True)
class NextTokens:
    """What a causal language model says of the tokens that it has to tell.

    Attributes:
        head: Turns hidden states into logits; of all tokens these are never held at once.
        hidden: The states from which a token is told.
        labels: The tokens that the data have there.
    """

    head: Head
    hidden: Float[Tensor, "places width"]
    labels: Int[Tensor, "places"]

    def logits(self, where: slice) -> Float[Tensor, "places classes"]:
        """See `Outcomes`."""
        return self.head.shaped(self.head.linear(self.hidden[where])).float()

    def log_likelihood(self, labels: Int[Tensor, "places"]) -> Float[Tensor, ""]:
        """See `Outcomes`."""
        return -cross_entropy(self.head, self.hidden, labels)


@dataclass(frozen=True, slots=True)
class RowLabels:
    """What a classifier says of its rows.

    Attributes:
        told: Its logits.
        labels: Those that the data have.
    """

    told: Float[Tensor, "places classes"]
    labels: Int[Tensor, "places"]

    def logits(self, where: slice) -> Float[Tensor, "places classes"]:
        """See `Outcomes`."""
        return self.told[where].float()

    def log_likelihood(self, labels: Int[Tensor, "places"]) -> Float[Tensor, ""]:
        """See `Outcomes`."""
        return -nn.functional.cross_entropy(self.told.float(), labels, reduction="sum")


def next_tokens(model: Any, batch: Batch) -> Outcomes:
    """Have a causal language model read a batch whose rows are one document each."""
    hidden, labels = answers(model, batch, packed=False)
    return NextTokens(head_of(model), hidden, labels)


def row_labels(model: Any, batch: Batch) -> Outcomes:
    """Have a classifier read a batch whose rows are one text each."""
    return RowLabels(*told_of(model, batch))


ASKED: Mapping[Architecture, Callable[[Any, Batch], Outcomes]] = {"decoder": next_tokens, "classifier": row_labels}
"""How each kind of model that tells something is asked."""


def read(batch: Batch) -> Bool[Tensor, "rows length"]:
    """Which tokens come no later than their row's last place with a label: the others tell nothing, or are padding."""
    asked = batch.targets != IGNORED
    return asked.flip(1).cumsum(1).flip(1) > 0
