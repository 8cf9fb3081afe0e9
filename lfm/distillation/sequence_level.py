"""Sequence-level distillation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lfm.distillation.base import Distill
from lfm.method import Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLevel(Distill):
    """Learn the answers that the teacher writes, as if they were the data's own.

    With `q` the student's distribution of the next token:

    1. Write. The teacher answers every prompt once, with the likeliest token at each place: the mode of its
       distribution over whole answers stands for all of that distribution.
    2. Read. Of each token the teacher is sure: `p` is 1 for the one that it wrote, and 0 for all others.
    3. Compare. The cross entropy between `p` and `q` is then that of plain tuning on the teacher's answers.

    The result, for each token, is `-sum(p * log q)`, which is `-log q` of the token that the teacher wrote.

    It has no hyper-parameters. As nothing but text is asked of the teacher, it may have another vocabulary, and may be
    a model of which nobody knows the probabilities.

    Differs from the paper:
        The mode is looked for greedily, which is a beam of one; the paper's beam has five. Its further variants,
        word-level distillation on this text and the beam's entry nearest to the data's answer, are left out.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[1.0, 0.0]]).log()
        >>> SequenceLevel().token_loss(student, teacher)  # log 4
        tensor([1.3863])

    Reference:
        Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016.
        https://arxiv.org/abs/1606.07947
    """

    reference, area, leaf = "arXiv:1606.07947", "distillation", "base"
    needs = Needs(access="text", data="unlabelled", architecture="decoder")
    answers: ClassVar[Literal["data", "teacher"]] = "teacher"

    @override
    def token_loss(
        self, student: Float[Tensor, "tokens outcomes"], teacher: Float[Tensor, "tokens outcomes"]
    ) -> Float[Tensor, "tokens"]:
        return -(teacher.exp() * student).sum(dim=-1)
