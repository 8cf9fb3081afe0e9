"""What is made small: the sum of a loss over the answer tokens of a batch of rows."""

from typing import Any

from torch import Tensor, nn

from lfm.chunks import chunked_cross_entropy
from lfm.networks import ImageNetwork
from operators.data.batches import IGNORED, Batch
from operators.models.language_models import Head, head_of, hidden_states
from operators.models.networks import seen


class Objective(nn.Module):
    """Base of what looks at a language model's hidden states and uses its head's weight without calling the head.

    Attributes:
        model: What learns.
        packed: Whether rows hold several documents.
        head: One, in a list: a submodule of the model must not be one of this module too.
    """

    def __init__(self, model: Any, *, packed: bool) -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self.head = [head_of(plain(model))]


class NextToken(Objective):
    """Cross entropy of the next token."""

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's loss tokens."""
        hidden, targets = answers(self.model, batch, packed=self.packed)
        return cross_entropy(self.head[0], hidden, targets)


def plain(model: Any) -> Any:
    """The transformers model, out of what PEFT puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answers(model: Any, batch: Batch, *, packed: bool) -> tuple[Tensor, Tensor]:
    """The hidden states from which a loss token is told, and those tokens: what has no loss never meets the head.

    Of a network for images these are the features of each image and its label.
    """
    if isinstance(model, ImageNetwork):
        return seen(model, batch)
    hidden = hidden_states(plain(model), batch.ids, batch.positions, packed=packed)
    learnt = batch.targets != IGNORED
    return hidden[learnt], batch.targets[learnt]


def cross_entropy(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """The sum over tokens, in float32, without holding the logits of all of them."""
    linear = head.linear
    shaped = None if head.plain else head.shaped
    return chunked_cross_entropy(hidden, linear.weight, targets, bias=linear.bias, shaped=shaped)
