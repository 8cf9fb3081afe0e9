"""Task arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lfm.merging._deltas import check_one_each, one_each
from lfm.merging.base import Merge


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskArithmetic(Merge):
    """Add what each expert learned to the base; a negative scale makes the base forget it.

    With `deltas[k] = experts[k] - base`, the task vectors, the result is `base + sum(scale[k] * deltas[k])`.

    Attributes:
        scale: Multiplies the deltas, one number for all experts or one for each, in their order. The paper's lambda.

    Differs from the paper:
        It chooses lambda on held-out data, the same for all; 0.3 is what that gives for its eight image tasks.

    Example:
        >>> experts = torch.tensor([[3.0, 1.0], [1.0, 5.0]])
        >>> TaskArithmetic(scale=0.5).merge("w", torch.ones(2), experts, {})
        tensor([2., 3.])

    Reference:
        Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023. https://arxiv.org/abs/2212.04089
    """

    reference, area, leaf = "arXiv:2212.04089", "reuse", "C2a"

    scale: float | tuple[float, ...] = 0.3

    @property
    @override
    def elementwise(self) -> bool:
        return True

    @override
    def beside(self, num_experts: int) -> int:
        return 3

    @override
    def check(self, num_experts: int) -> None:
        check_one_each(self, "scale", num_experts)

    @override
    def merge(
        self,
        name: str,
        base: Float[Tensor, "*shape"],
        experts: Float[Tensor, "experts *shape"],
        found: Mapping[str, Tensor],
    ) -> Float[Tensor, "*shape"]:
        scales = one_each(self, "scale", experts)
        delta = experts[0] - base
        total = delta * scales[0]
        for scale, expert in zip(scales[1:], experts[1:], strict=True):  # a product with all of them would double them
            total.addcmul_(scale, torch.sub(expert, base, out=delta))
        return total.add_(base)
