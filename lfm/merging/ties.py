"""TIES-Merging."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
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
        return num_experts + 6

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
            return sum_of(self._trimmed(base, experts, found)).sign_().long().sum()
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
        weights = one_each(self, "weights", experts).flatten().tolist()
        deltas = self._trimmed(base, experts, found)
        if self.convention == "mergekit":
            deltas = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
        elected = sum_of(deltas).sign_()
        if self.convention != "paper":  # it lets a draw keep the base
            draw = found["majority"] if self.convention == "fusion_bench" else 1.0
            elected += draw * (1 - elected.abs())
        total, voters = torch.zeros_like(base), torch.zeros_like(base)
        for delta, weight in zip(deltas, weights, strict=True):
            mass = torch.mul(delta, elected, out=delta).clamp_(min=0)  # 0 where it has another sign, or none
            total.add_(mass, alpha=weight if self.convention == "peft" else 1)
            voters.add_(mass.sign_(), alpha=weight if self.convention == "mergekit" else 1)
        total *= elected
        if self.convention != "fusion_bench":
            total /= voters + (voters == 0)
        return base + self.scale * total

    @property
    def _whole(self) -> bool:
        """Whether the whole flattened model is trimmed, not each parameter on its own."""
        return self.convention in ("paper", "fusion_bench")

    def _trimmed(self, base: Tensor, experts: Tensor, found: Mapping[str, Tensor]) -> list[Tensor]:
        """The deltas of all experts, in memory of their own, with 0 where they do not survive."""
        deltas = [expert - base for expert in experts]
        if self.density == 1:
            return deltas
        if not self._whole:
            return [largest(delta, self._kept(base.numel())) for delta in deltas]
        limits = found["threshold"].tolist()
        return [at_least(delta, limit) for delta, limit in zip(deltas, limits, strict=True)]

    def _kept(self, size: int) -> int:
        """How many of `size` values survive."""
        if self.convention == "paper":  # 0.29 * 100 is 28.999...: rounding is what the share means
            return max(1, round(self.density * size))
        return max(0 if self.convention == "peft" else 1, math.floor(self.density * size))


def histogram(values: Float[Tensor, "*shape"], high: int | None) -> Int[Tensor, "bins"]:
    """Counts of the high halves of all magnitudes' bits, or of the low halves where the high one is `high`.

    The bits of a float32 that is not negative, read as an integer, are in the order of the values.
    """
    bits = values.abs().reshape(-1).view(torch.int32)
    if high is not None:
        array = bits.cpu().numpy()  # NumPy picks out few of many values in an eighth of the time
        bits = torch.from_numpy(array[(array >> HALF) == high] & (2**HALF - 1)).to(values.device)
    else:
        bits >>= HALF
    return torch.bincount(bits, minlength=2**HALF)


def locate(
    counts: Int[Tensor, "experts bins"], ranks: Int[Tensor, "experts"]
) -> tuple[Int[Tensor, "experts"], Int[Tensor, "experts"]]:
    """For each expert the bin of its `ranks`-th largest value, and that value's rank within the bin; from 1."""
    down = counts.flip(1).cumsum(1)
    place = (down < ranks[:, None]).sum(dim=1)  # bins that are passed from above
    passed = torch.where(place > 0, down.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0], 0)
    return counts.shape[1] - 1 - place, ranks - passed


def sum_of(deltas: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    """Their sum, in memory of its own."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total


def at_least(delta: Float[Tensor, "*shape"], limit: float) -> Float[Tensor, "*shape"]:
    """The values whose magnitude is `limit` or more, 0 in place of the others."""
    if limit == 0:
        return delta
    below = float(np.nextafter(np.float32(limit), np.float32(0)))
    return torch.nn.functional.hardshrink(delta, below)


def largest(delta: Float[Tensor, "*shape"], kept: int) -> Float[Tensor, "*shape"]:
    """The `kept` values of largest magnitude, of equal ones the first, 0 in place of the others."""
    size = delta.numel()
    if kept >= size:
        return delta
    if not kept:
        return torch.zeros_like(delta)
    magnitudes = delta.abs().reshape(-1).cpu().numpy()
    limit = np.partition(magnitudes, size - kept)[size - kept]
    found = at_least(delta, float(limit)).reshape(-1)
    surplus = int(torch.count_nonzero(found)) - kept if limit > 0 else 0
    if surplus > 0:
        found[torch.from_numpy(np.flatnonzero(magnitudes == limit)[-surplus:]).to(found.device)] = 0
    return found.reshape(delta.shape)
