"""Generalised Jensen-Shannon divergence."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lfm.distillation.base import Distill


@dataclass(frozen=True, kw_only=True, slots=True)
class JSD(Distill):
    """Learn from the teacher's distribution on a mixture of given text and text that the student writes itself.

    With `p` the teacher's and `q` the student's distribution of the next token:

    1. Write. In a `student_share` of the batches, drawn one by one, the student answers the prompts in place of the
       data; no gradient goes through what it draws.
    2. Mix. `m = beta * p + (1 - beta) * q`.
    3. Compare both with the mixture, which keeps the divergence bounded.

    The result, for each token, is `beta * KL(p || m) + (1 - beta) * KL(q || m)`.

    Attributes:
        beta: Between forward KL (near 0) and reverse KL (near 1), in [0, 1]. The paper's beta.
        student_share: Share of batches whose answers the student writes, in [0, 1]. The paper's lambda. Above 0 it
            needs prompts.
        temperature: Softens both distributions, above 0; the paper's is 1.
        convention: What the ends mean. In ``paper`` the formula holds everywhere, and its values shrink towards 0 at
            either end (divided by `beta`, or by `1 - beta`, they approach the two KLs); 0 and 1 themselves would teach
            nothing and are refused. In ``trl`` 0 is `KL(p || q)` and 1 is `KL(q || p)`, unlike the values beside them.

    Differs from the paper:
        Only where the convention is not ``paper``. Tokens are averaged over the batch, not first over each answer.

    Example:
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0 - 1e-7, 1e-7]]).log()
        >>> JSD().token_loss(student, teacher)  # 0.5 * log(4 / 3) + 0.25 * log(2 / 3) + 0.25 * log 2
        tensor([0.2158])

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", ICLR 2024.
        https://arxiv.org/abs/2306.13649
    """

    reference, area, leaf = "arXiv:2306.13649", "distillation", "base"
    adjustable = frozenset({"beta", "temperature"})

    beta: float = 0.5
    student_share: float = 0.5
    temperature: float = 1.0
    convention: Literal["paper", "trl"] = "paper"

    def __post_init__(self) -> None:
        self.require(self.convention in ("paper", "trl"), "convention", "one of paper, trl")
        self.require(0 <= self.beta <= 1, "beta", "0 <= beta <= 1")
        inside = 0 < self.beta < 1 or self.convention == "trl"
        self.require(inside, "beta", "0 < beta < 1, or convention 'trl', as the paper's formula is 0 at its ends")
        self.require(0 <= self.student_share <= 1, "student_share", "0 <= student_share <= 1")
        self.require(self.temperature > 0, "temperature", "temperature > 0")

    @override
    def token_loss(
        self, student: Float[Tensor, "tokens outcomes"], teacher: Float[Tensor, "tokens outcomes"]
    ) -> Float[Tensor, "tokens"]:
        if self.beta == 0:
            return (teacher.exp() * (teacher - student)).sum(dim=-1)
        if self.beta == 1:
            return (student.exp() * (student - teacher)).sum(dim=-1)
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        from_teacher = (teacher.exp() * (teacher - mixture)).sum(dim=-1)
        from_student = (student.exp() * (student - mixture)).sum(dim=-1)
        return self.beta * from_teacher + (1 - self.beta) * from_student
