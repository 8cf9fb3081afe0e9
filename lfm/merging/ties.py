"""TIES-Merging."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from lfm.merging._deltas import check_one_each, one_each
from lfm.merging.base import Merge

HALF = 16  # bits that one pass decides; a histogram has 65,536 counts for each expert then


@dataclass(frozen=True, kw_only=True, slots=True)
class TIES(Merge):
    """Merge task vectors after removing what makes them cancel: small values and minority signs.

    With `deltas[k] = experts[k] - base`:

    1. Trim. Keep the `density` share of largest magnitudes of each delta, zero the rest.
    2. Elect. At every position, take the sign of the sum over experts: the direction with more mass.
    3. Merge. Average the surviving values that have the elected sign.

    The result is `base + scale * average`.

    Attributes:
        density: Share of each delta that survives trimming, in (0, 1]. The paper's k, as a fraction.
        scale: Multiplies the merged delta. The paper's lambda.
        convention: Whose arithmetic. ``paper`` trims the whole flattened model, keeps at least one value, and all that
            are as large as the smallest one kept; where no sign wins, the base stays.
            ``mergekit`` trims each parameter, elects on weighted deltas (a draw is +) and divides by the weights that
            agree. ``peft`` trims each parameter, rounds down (to none at all, where it is small), elects on plain
            deltas (a draw is +) and divides the weighted sum by the number that agree. ``fusion_bench`` trims the
            whole model, gives draws the sign that most positions elected, and adds up instead of averaging.
        weights: A number for each expert, in their order, with ``mergekit`` and ``peft`` only; None gives each 1.

    Differs from the paper:
        Only in a convention other than ``paper``. These do what the libraries do to a whole model, in float32, but
        ``fusion_bench`` keeps `density` of the values where the library keeps one value more.

    Example:
        >>> base = torch.zeros(3)
        >>> experts = torch.tensor([[4.0, 1.0, -3.0], [2.0, -5.0, 0.1]])
        >>> TIES(density=2 / 3, convention="peft").merge("w", base, experts, {})
        tensor([ 3., -5., -3.])

    Reference:
        Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023.
        https://arxiv.org/abs/2306.01708
    """

    reference, area, leaf = "arXiv:2306.01708", "reuse", "C2a"

    density: float = 0.2
    scale: float = 1.0
    convention: Literal["paper", "mergekit", "peft", "fusion_bench"] = "paper"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        self.require(0 < self.density <= 1, "density", "0 < density <= 1")
        conventions = ("paper", "mergekit", "peft", "fusion_bench")
        self.require(self.convention in conventions, "convention", f"one of {', '.join(conventions)}")
        weighs = self.convention in ("mergekit", "peft")
        self.require(self.weights is None or weighs, "weights", "none, or convention 'mergekit' or 'peft'")

    @property
    @override
    def elementwise(self) -> bool:
        return self._whole or self.density == 1

    @override
    def beside(self, num_experts: int) -> int:
        return 4 * num_experts + 4

    @override
    def check(self, num_experts: int) -> None:
        check_one_each(self, "weights", num_experts)

    @property
    @override
    def passes(self) -> int:
        if not self._whole:
            return 0
        return (2 if self.density < 1 else 0) + (1 if self.convention == "fusion_bench" else 0)

    @override
    def scan(
        self,
        name: str,
        base: Float[Tensor, "*shape"],
        experts: Float[Tensor, "experts *shape"],
        found: Mapping[str, Tensor],
    ) -> Tensor | None:
        if self.density == 1 or "threshold" in found:
            return self._trimmed(base, experts, found).sum(dim=0).sign().long().sum()
        bins = found["bin"].tolist() if "bin" in found else [None] * len(experts)
        return torch.stack([histogram(e - base, b) for e, b in zip(experts, bins, strict=True)])

    @override
    def settle(self, total: Tensor, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.density == 1 or "threshold" in found:
            return {"majority": torch.where(total > 0, 1.0, -1.0)}
        if "bin" not in found:
            bins, ranks = locate(total, torch.full_like(total[:, 0], self._kept(int(total[0].sum()))))
            return {"bin": bins, "rank": ranks}
        low, _ = locate(total, found["rank"])
        bits = (found["bin"] << HALF) | low
        return {"threshold": bits.to(torch.int32).view(torch.float32)}

    @override
    def merge(
        self,
        name: str,
        base: Float[Tensor, "*shape"],
        experts: Float[Tensor, "experts *shape"],
        found: Mapping[str, Tensor],
    ) -> Float[Tensor, "*shape"]:
        weights = one_each(self, "weights", experts)
        deltas = self._trimmed(base, experts, found)
        weighted = deltas * weights
        votes = weighted if self.convention == "mergekit" else deltas
        mass = votes.sum(dim=0)
        draw = found["majority"] if self.convention == "fusion_bench" else 0.0 if self.convention == "paper" else 1.0
        elected = torch.where(mass == 0, draw, mass.sign())
        agrees = (votes.sign() == elected) & (votes != 0)
        total = torch.where(agrees, weighted, 0.0).sum(dim=0)
        if self.convention == "fusion_bench":
            return base + self.scale * total
        voters = (agrees * (weights if self.convention == "mergekit" else 1.0)).sum(dim=0)
        return base + self.scale * (total / torch.where(voters == 0, 1.0, voters))

    @property
    def _whole(self) -> bool:
        """Whether the whole flattened model is trimmed, not each parameter on its own."""
        return self.convention in ("paper", "fusion_bench")

    def _trimmed(self, base: Tensor, experts: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        deltas = experts - base
        if self.density == 1:
            return deltas
        if self._whole:
            limits = found["threshold"].to(deltas.device).reshape(-1, *(1 for _ in base.shape))
            return deltas.masked_fill_(deltas.abs() < limits, 0.0)
        return deltas.masked_fill_(~largest(deltas, self._kept(base.numel())), 0.0)

    def _kept(self, size: int) -> int:
        """How many of `size` values survive."""
        if self.convention == "paper":  # 0.29 * 100 is 28.999...: rounding is what the share means
            return max(1, round(self.density * size))
        return max(0 if self.convention == "peft" else 1, math.floor(self.density * size))


def histogram(values: Float[Tensor, "*shape"], high: int | None) -> Int[Tensor, "bins"]:
    """Counts of the high halves of all magnitudes' bits, or of the low halves where the high one is `high`.

    The bits of a float32 that is not negative, read as an integer, are in the order of the values.
    """
    bits = values.abs().contiguous().view(torch.int32).reshape(-1)
    halves = bits >> HALF if high is None else bits[bits >> HALF == high] & (2**HALF - 1)
    return torch.bincount(halves, minlength=2**HALF)


def locate(
    counts: Int[Tensor, "experts bins"], ranks: Int[Tensor, "experts"]
) -> tuple[Int[Tensor, "experts"], Int[Tensor, "experts"]]:
    """For each expert the bin of its `ranks`-th largest value, and that value's rank within the bin; from 1."""
    down = counts.flip(1).cumsum(1)
    place = (down < ranks[:, None]).sum(dim=1)  # bins that are passed from above
    passed = torch.where(place > 0, down.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0], 0)
    return counts.shape[1] - 1 - place, ranks - passed


def largest(deltas: Float[Tensor, "experts *shape"], kept: int) -> Bool[Tensor, "experts *shape"]:
    """True at the `kept` largest magnitudes of each expert's delta."""
    flat = deltas.reshape(len(deltas), math.prod(deltas.shape[1:]))
    places = flat.abs().topk(min(kept, flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, places, value=True).reshape(deltas.shape)
