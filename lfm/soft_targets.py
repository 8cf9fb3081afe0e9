"""What a teacher says of each token, whole or its likeliest tokens only, and a student's loss on it in chunks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lfm.chunks import chunk_size, chunked
from lfm.distillation.base import Distill

Shaped = Callable[[Tensor], Tensor]
"""What a model does to its logits after the head, such as a soft cap."""


class Whole(ABC):
    """Distributions over a whole vocabulary, each computed only when its chunk is looked at.

    Attributes:
        temperature: Divides the logits.
    """

    __slots__ = ()
    temperature: float

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many entries a distribution has, of which the last may be padding."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are computed."""

    @abstractmethod
    def __len__(self) -> int:
        """How many tokens there are."""

    @abstractmethod
    def log_shares(self, where: slice, vocabulary: int | None = None) -> Float[Tensor, "tokens vocab"]:
        """Log-probabilities of some tokens' successors, in float32, among the first `vocabulary` entries."""

    def compare(self, logits: Float[Tensor, "tokens vocab"], where: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities of student and teacher; entries beyond the smaller vocabulary are padding and left out."""
        both = min(logits.shape[1], self.vocabulary)
        student = softened(logits[:, :both], self.temperature).log_softmax(dim=-1)
        return student, self.log_shares(where, both)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense(Whole):
    """What a teacher says, from its hidden states and its head.

    Attributes:
        hidden: What goes into the teacher's head.
        weight: The head's weight; its dtype is that of the product.
        temperature: Divides the logits.
        bias: The head's bias.
        shaped: What follows the head.
    """

    hidden: Float[Tensor, "tokens width"]
    weight: Float[Tensor, "vocab width"]
    temperature: float
    bias: Float[Tensor, "vocab"] | None = None
    shaped: Shaped | None = None

    @property
    @override
    def vocabulary(self) -> int:
        return len(self.weight)

    @property
    @override
    def device(self) -> torch.device:
        return self.weight.device

    @override
    def __len__(self) -> int:
        return len(self.hidden)

    @override
    @torch.no_grad()
    def log_shares(self, where: slice, vocabulary: int | None = None) -> Float[Tensor, "tokens vocab"]:
        hidden = self.hidden[where].to(self.weight.dtype)
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
        logits = (logits if self.shaped is None else self.shaped(logits))[:, :vocabulary]
        return softened(logits, self.temperature).log_softmax(dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Joint(Whole):
    """What several teachers say together.

    Attributes:
        members: What each says of the same tokens, at temperature 1.
        combine: Makes log-probabilities of theirs, of shape (members, tokens, vocab).
        temperature: Divides the logarithms of what comes out.
    """

    members: Sequence[Dense]
    combine: Callable[[Tensor], Tensor]
    temperature: float

    @property
    @override
    def vocabulary(self) -> int:
        return self.members[0].vocabulary

    @property
    @override
    def device(self) -> torch.device:
        return self.members[0].device

    @override
    def __len__(self) -> int:
        return len(self.members[0])

    @override
    @torch.no_grad()
    def log_shares(self, where: slice, vocabulary: int | None = None) -> Float[Tensor, "tokens vocab"]:
        said = self.combine(torch.stack([member.log_shares(where) for member in self.members]))
        return softened(said[:, :vocabulary], self.temperature).log_softmax(dim=-1)


@dataclass(frozen=True, slots=True)
class TopK:
    """A teacher's likeliest tokens, and one more outcome for all others together.

    Attributes:
        tokens: Which they are.
        shares: Their log-probabilities, and last that of all others; nothing is last where there are no others.
        vocabulary: How many entries there are with the others; what the student has beyond is padding.
        temperature: Divided the teacher's logits, and divides the student's.
    """

    tokens: Int[Tensor, "tokens k"]
    shares: Float[Tensor, "tokens outcomes"]
    vocabulary: int
    temperature: float

    def compare(self, logits: Float[Tensor, "tokens vocab"], where: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities of student and teacher; the teacher's sum to 1 again, however they were rounded."""
        tokens = self.tokens[where].long()
        logits = softened(logits[:, : self.vocabulary], self.temperature)
        student = grouped(logits, tokens, others=self.vocabulary > tokens.shape[1])
        return student, self.shares[where].float().log_softmax(dim=-1)


def softened(logits: Float[Tensor, "tokens vocab"], temperature: float) -> Float[Tensor, "tokens vocab"]:
    """Logits divided by a temperature, and themselves at 1: a pass over all of them less."""
    return logits if temperature == 1 else logits / temperature


def likeliest(teacher: Whole, k: int, vocabulary: int, *, chunk: int | None = None) -> TopK:
    """The `k` likeliest of the first `vocabulary` tokens at each place, without holding all distributions."""
    size = chunk or chunk_size(teacher.vocabulary, teacher.device)
    tokens, shares = [], []
    for start in range(0, len(teacher), size):
        everything = teacher.log_shares(slice(start, start + size), vocabulary)
        tokens.append(everything.topk(k, dim=-1).indices)
        shares.append(grouped(everything, tokens[-1], others=k < vocabulary))
    return TopK(torch.cat(tokens), torch.cat(shares), vocabulary, teacher.temperature)


def grouped(
    logits: Float[Tensor, "tokens vocab"], tokens: Int[Tensor, "tokens k"], *, others: bool
) -> Float[Tensor, "tokens outcomes"]:
    """Log-probabilities of `tokens` and, where there are `others`, of all others together.

    That last one is a sum over the others, not 1 minus the rest: it stays exact where it is tiny.
    """
    named = logits.gather(1, tokens)
    if not others:
        return named.log_softmax(dim=-1)
    rest = logits.scatter(1, tokens, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return torch.cat([named, rest], dim=-1).log_softmax(dim=-1)


def chunked_distillation(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    teacher: Whole | TopK,
    method: Distill,
    *,
    targets: Int[Tensor, "tokens"] | None = None,
    hard_weight: float = 0.0,
    bias: Float[Tensor, "vocab"] | None = None,
    shaped: Shaped | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """The summed loss of a student, in float32; the logits of neither model exist for more than a chunk of tokens.

    Args:
        hidden: What goes into the student's head.
        weight: The student's head.
        teacher: What the teacher says of the same tokens.
        method: How far apart they are.
        targets: The token that follows each; needed where `hard_weight` is above 0.
        hard_weight: The share of the cross entropy of `targets` in the loss, in [0, 1].
        bias: The student's head's.
        shaped: What follows the student's head.
        chunk: Tokens at once; None takes few enough for a bounded number of logits.
    """

    def loss(logits: Tensor, where: slice) -> Tensor:
        logits = logits.float()
        logits = logits if shaped is None else shaped(logits)
        soft = method.token_loss(*teacher.compare(logits, where)).sum()
        if not hard_weight:
            return soft
        assert targets is not None
        hard = torch.nn.functional.cross_entropy(logits, targets[where], reduction="sum")
        return (1 - hard_weight) * soft + hard_weight * hard

    return chunked(hidden, weight, bias, loss, chunk=chunk)
