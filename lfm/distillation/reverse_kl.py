"""Reverse KL."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lfm.distillation.base import Distill


@dataclass(frozen=True, kw_only=True, slots=True)
class ReverseKL(Distill):
    """Keep the student to what the teacher finds likely, on text that the student writes itself.

    With `p` the teacher's and `q` the student's distribution of the next token:

    1. Write. In a `student_share` of the batches the student answers the prompts in place of the data.
    2. Compare. `KL(q || p)` charges the student where it says what the teacher would not; what it leaves out is free,
       so that a small student gives up rare tokens rather than spreading itself thin.

    The result, for each token, is `sum(q * (log q - log p))`.

    Attributes:
        student_share: Share of batches whose answers the student writes, in [0, 1]; the paper's is 1. Above 0 it
            needs prompts.
        temperature: Softens both distributions, above 0; the paper's is 1.

    Differs from the paper:
        Each token's divergence is summed over the vocabulary and differentiated, with the text held fixed: the paper's
        single-step part. Its long-term part (a policy gradient of what follows the token, normalised by length),
        sampling from a mixture with the teacher, and the language modelling loss on other text are left out.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
        >>> ReverseKL().token_loss(student, teacher)  # 0.5 * log 0.625 + 0.5 * log 2.5
        tensor([0.2231])

    Reference:
        Gu, Dong, Wei and Huang, "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024.
        https://arxiv.org/abs/2306.08543
    """

    reference, area, leaf = "arXiv:2306.08543", "distillation", "base"
    adjustable = frozenset({"temperature"})

    student_share: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.require(0 <= self.student_share <= 1, "student_share", "0 <= student_share <= 1")
        self.require(self.temperature > 0, "temperature", "temperature > 0")

    @override
    def token_loss(
        self, student: Float[Tensor, "tokens outcomes"], teacher: Float[Tensor, "tokens outcomes"]
    ) -> Float[Tensor, "tokens"]:
        return (student.exp() * (student - teacher)).sum(dim=-1)
