"""Weighted mean of weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lfm.merging._deltas import check_one_each, one_each
from lfm.merging.base import Merge


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Merge):
    """Average the weights of models fine-tuned from one base (a model soup); the base itself has no weight in it.

    The result is `sum(weights[k] * experts[k]) / sum(weights)`, or the sum alone without `normalize`.

    Attributes:
        weights: A number for each expert, in their order; None gives each 1, which makes the uniform soup.
        normalize: Divide by the sum of the weights, which must not be 0 then.

    Differs from the paper:
        Its soups are uniform, or greedy, which is a search; weights of any size are what neighbours call ``linear``.

    Example:
        >>> experts = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> Linear(weights=(3.0, 1.0)).merge("w", torch.zeros(2), experts, {})
        tensor([1.5000, 3.0000])

    Reference:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time", ICML 2022. https://arxiv.org/abs/2203.05482
    """

    reference, area, leaf = "arXiv:2203.05482", "reuse", "C2a"

    weights: tuple[float, ...] | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        adds_up = self.weights is None or not self.normalize or sum(self.weights) != 0
        self.require(adds_up, "weights", "a sum other than 0, or normalize false")

    @property
    @override
    def elementwise(self) -> bool:
        return True

    @property
    @override
    def reads_base(self) -> bool:
        return False

    @override
    def beside(self, num_experts: int) -> int:
        return 2

    @override
    def check(self, num_experts: int) -> None:
        check_one_each(self, "weights", num_experts)

    @override
    def merge(
        self,
        name: str,
        base: Float[Tensor, "*shape"],
        experts: Float[Tensor, "experts *shape"],
        found: Mapping[str, Tensor],
    ) -> Float[Tensor, "*shape"]:
        weights = one_each(self, "weights", experts)
        total = torch.mul(experts[0], weights[0])
        for weight, expert in zip(
            weights[1:], experts[1:], strict=True
        ):  # a product with all of them would double them
            total.addcmul_(weight, expert)
        return total.div_(weights.sum()) if self.normalize else total
