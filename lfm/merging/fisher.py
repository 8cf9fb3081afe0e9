"""Fisher merging."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lfm.merging._deltas import check_one_each, one_each
from lfm.merging.base import Merge
from lfm.method import Needs

MANTISSA = 24  # bits of a float32's
LOWEST, HIGHEST = -148, 128  # exponents that a float32 has, where its mantissa is in [0.5, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class FisherMerging(Merge):
    """Average the experts, each parameter weighted by how much it matters for what its expert says.

    With `fishers[k]` the diagonal of the Fisher information that was measured of `experts[k]`:

    1. Scale. Divide each expert's weight by the norm of its whole Fisher diagonal, as these differ by orders of size.
    2. Raise what is below `floor` to it: where no expert has any information, they are averaged.
    3. Average with `importance[k] = weights[k] / norm[k] * max(fishers[k], floor)` at every position.

    The result is `sum(importance[k] * experts[k]) / sum(importance[k])`: the likeliest weights where each expert's
    posterior is a Gaussian around it with its Fisher information as precision. The base has no part in it.

    Attributes:
        floor: The least Fisher information, above 0.
        normalize: Divide by norms; False takes the information as it was measured.
        weights: A number for each expert, in their order, at least 0; None gives each the same. The paper's lambda.
        convention: Whose arithmetic. ``paper`` as above. ``release``, the authors' code, raises the first expert's
            alone, so that it wins where no other has information. ``fusion_bench`` adds `floor` to all information and
            to norms, instead of raising what is below.

    Differs from the paper:
        Its formula has neither a floor nor norms; both are of its released code. What has no Fisher information at
        all, such as the running statistics of a batch norm, which no gradient passes, is averaged with `weights`.

    Example:
        >>> found = {"fisher": torch.tensor([[3.0, 1.0], [1.0, 1.0]])}
        >>> FisherMerging(normalize=False).merge("w", torch.zeros(2), torch.tensor([[4.0, 0.0], [0.0, 4.0]]), found)
        tensor([3., 2.])

    Reference:
        Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022.
        https://arxiv.org/abs/2111.09832
    """

    reference, area, leaf = "arXiv:2111.09832", "reuse", "C2a"
    needs = Needs(access="weights", data="none", models=(1, None), statistics=("fisher",))

    floor: float = 1e-6
    normalize: bool = True
    weights: tuple[float, ...] | None = None
    convention: Literal["paper", "release", "fusion_bench"] = "paper"

    def __post_init__(self) -> None:
        self.require(self.floor > 0, "floor", "floor > 0")
        weighs = self.weights is None or (min(self.weights, default=0) >= 0 and sum(self.weights) > 0)
        self.require(weighs, "weights", "numbers of at least 0, one above it")
        conventions = ("paper", "release", "fusion_bench")
        self.require(self.convention in conventions, "convention", f"one of {', '.join(conventions)}")

    @override
    def check(self, num_experts: int) -> None:
        check_one_each(self, "weights", num_experts)

    @property
    @override
    def passes(self) -> int:
        return 1 if self.normalize else 0

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
        return 8  # what `squares` holds of one expert, in integers of twice the size

    @override
    def scan(
        self,
        name: str,
        base: Float[Tensor, "*shape"],
        experts: Float[Tensor, "experts *shape"],
        found: Mapping[str, Tensor],
    ) -> Tensor | None:
        return torch.stack([squares(one) for one in found["fisher"]]) if "fisher" in found else None

    @override
    def settle(self, total: Tensor, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"norms": root(total)}

    @override
    def merge(
        self,
        name: str,
        base: Float[Tensor, "*shape"],
        experts: Float[Tensor, "experts *shape"],
        found: Mapping[str, Tensor],
    ) -> Float[Tensor, "*shape"]:
        weights = one_each(self, "weights", experts)
        mass, total = torch.zeros_like(base), torch.zeros_like(base)
        for k, expert in enumerate(experts):  # a product with the whole stack would double it
            importance = weights[k] * self._information(k, found).to(base.device)
            mass += importance
            # From the first expert on: where all are equal, so is the result, bit for bit.
            total += importance * (expert - experts[0])
        return experts[0] + total / mass

    def _information(self, k: int, found: Mapping[str, Tensor]) -> Tensor:
        """What an expert's weight is multiplied by, at every position."""
        if "fisher" not in found:
            return torch.ones(())
        fisher = found["fisher"][k]
        norm = found["norms"][k].float() if self.normalize else torch.ones(())
        if self.convention == "fusion_bench":
            return (fisher + self.floor) / (norm + self.floor if self.normalize else norm)
        raised = fisher.clamp(min=self.floor) if self.convention == "paper" or k == 0 else fisher
        return raised / norm.clamp(min=self.floor)


def squares(values: Float[Tensor, "*shape"]) -> Int[Tensor, "exponents halves"]:
    """The squares of float32 values, added up exactly as integers, for each exponent on its own: in any order."""
    mantissas, exponents = torch.frexp(values.reshape(-1))
    whole = (mantissas * 2**MANTISSA).long()
    square = whole * whole  # of 48 bits: of each half 2^39 can be added up
    halves = torch.stack([square >> MANTISSA, square & (2**MANTISSA - 1)], dim=1)
    counts = torch.zeros(HIGHEST - LOWEST + 1, 2, dtype=torch.int64, device=values.device)
    return counts.index_add_(0, exponents.long() - LOWEST, halves)


def root(total: Int[Tensor, "experts exponents halves"]) -> Float[Tensor, "experts"]:
    """The square root of what `squares` added up, in float64."""
    high, low = total.double().unbind(dim=-1)
    exponents = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float64, device=total.device) - MANTISSA
    return ((high * (1 << MANTISSA) + low) * (2 * exponents).exp2()).sum(dim=-1).sqrt()
