"""Distillation of hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lfm.distillation.base import DistillFeatures
from lfm.distillation.forward_kl import ForwardKL
from lfm.errors import HyperparameterError


@dataclass(frozen=True, kw_only=True, slots=True)
class Hidden(DistillFeatures):
    """Match what flows between the teacher's layers, not only what it says at the end.

    With `s` and `t` what flows in student and teacher at the depths of a pair:

    1. Pair. Depth m of the student learns from depth g(m) of the teacher, as `mapping` says; depth 0 are embeddings.
    2. Project. Where the widths differ, a matrix of each pair's own leads from `s` to the width of `t`. It learns with
       the student and is dropped at the end.
    3. Compare. The mean over the width of the squared difference, or one minus the cosine, summed over the pairs.
    4. Add what the teacher says of the next token, `KL(p || q)` at `temperature`, as far as `logits_share` says.

    The result, for each token, is `(1 - logits_share) * sum(mean((W s - t)**2)) + logits_share * T**2 * KL(p || q)`.

    Attributes:
        mapping: ``uniform`` pairs each depth m of M with `m * N // M` of the teacher's N, the embeddings too, which is
            the paper's g(m) = 3m where N is 3M; ``last`` the last with the last; else pairs of depths, each from 0.
        distance: ``mse`` is the paper's; ``cosine`` looks at directions alone, as DistilBERT does.
        logits_share: How much the next token weighs, in [0, 1]; at 0.5 both weigh the same, as in the paper.
        temperature: Softens both distributions of the next token, above 0; the paper's t, which is 1.

    Differs from the paper:
        It is of decoders, and at the tokens that are learnt, not at all of them. The attention's own loss is left out:
        fast attention has no matrix to look at. Both losses are one stage, where the paper learns the next after the
        other; there is no projection where the widths are the same, so that a student that is its teacher has no loss.

    Example:
        >>> student, teacher = [torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.0, 5.0]])]
        >>> Hidden(logits_share=0.0).feature_loss(student, teacher)  # (0 + 9) / 2
        tensor([4.5000])
        >>> Hidden().taps(2, 6)
        ((0, 0), (1, 3), (2, 6))

    Reference:
        Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", Findings of EMNLP 2020.
        https://arxiv.org/abs/1909.10351
    """

    reference, area, leaf = "arXiv:1909.10351", "distillation", "base"
    adjustable = frozenset({"logits_share", "temperature"})

    mapping: Literal["uniform", "last"] | tuple[tuple[int, int], ...] = "uniform"
    distance: Literal["mse", "cosine"] = "mse"
    logits_share: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        named = self.mapping in ("uniform", "last")
        pairs = not isinstance(self.mapping, str) and len(self.mapping) > 0 and min(map(min, self.mapping)) >= 0
        self.require(named or pairs, "mapping", "uniform, last, or pairs of depths >= 0")
        self.require(self.distance in ("mse", "cosine"), "distance", "one of mse, cosine")
        self.require(0 <= self.logits_share <= 1, "logits_share", "0 <= logits_share <= 1")
        self.require(self.temperature > 0, "temperature", "temperature > 0")

    @override
    def token_loss(
        self, student: Float[Tensor, "tokens outcomes"], teacher: Float[Tensor, "tokens outcomes"]
    ) -> Float[Tensor, "tokens"]:
        return self.logits_share * ForwardKL(temperature=self.temperature).token_loss(student, teacher)

    @override
    def taps(self, num_student: int, num_teacher: int) -> tuple[tuple[int, int], ...]:
        if self.mapping == "uniform":
            return tuple((m, m * num_teacher // num_student) for m in range(num_student + 1))
        if self.mapping == "last":
            return ((num_student, num_teacher),)
        assert not isinstance(self.mapping, str)
        if any(m > num_student or n > num_teacher for m, n in self.mapping):
            allowed = f"depths up to {num_student} of the student and {num_teacher} of the teacher"
            raise HyperparameterError(type(self).__name__, "mapping", self.mapping, allowed)
        return self.mapping

    @override
    def projections(self, widths: Sequence[tuple[int, int]]) -> nn.ModuleList:
        return nn.ModuleList(nn.Identity() if s == t else nn.Linear(s, t, bias=False) for s, t in widths)

    @override
    def feature_loss(
        self, student: Sequence[Float[Tensor, "tokens width"]], teacher: Sequence[Float[Tensor, "tokens width"]]
    ) -> Float[Tensor, "tokens"]:
        each = [self._distance(s, t) for s, t in zip(student, teacher, strict=True)]
        return (1 - self.logits_share) * torch.stack(each).sum(dim=0)

    def _distance(
        self, student: Float[Tensor, "tokens width"], teacher: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "tokens"]:
        if self.distance == "cosine":
            return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)
        return (student - teacher).square().mean(dim=-1)
