"""Spherical linear interpolation."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lfm.merging.base import Merge
from lfm.method import Needs

PARALLEL = 0.9995  # from this cosine on the arc is as good as straight, and its sine too small to divide by
SMALLEST = 1e-8  # a norm below it is taken for 1, so that the cosine is 0
BLOCK = 1 << 16  # values that are added up in float32's stead at once


@dataclass(frozen=True, kw_only=True, slots=True)
class SLERP(Merge):
    """Walk from one model to another on the arc between them instead of the chord, which would shrink the weights.

    For each parameter, taken as one vector, with `a` and `b` the two experts:

    1. Find the angle between `a` and `b`.
    2. Weigh `a` with the sine of what is left of the angle, `b` with that of what has been walked.
    3. Where they are all but parallel, take the straight line.

    The result is `(sin((1 - t) * angle) * a + sin(t * angle) * b) / sin(angle)`; the base has no part in it.

    Attributes:
        t: How far to walk, in [0, 1]: 0 is the first expert, 1 the second. The paper's t.

    Differs from the paper:
        It walks between rotations, which have length 1. Weights are of any length, and as in the neighbours (mergekit,
        fusion_bench) the angle is that of the directions and the weights multiply the vectors as they are. A cosine
        beyond 0.9995 or below -0.9995 makes it straight, and a norm below 1e-8 stands at a right angle to all.

    Example:
        >>> experts = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> SLERP(t=0.5).merge("w", torch.zeros(2), experts, {})
        tensor([1.4142, 1.4142])

    Reference:
        Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985. https://doi.org/10.1145/325334.325242
    """

    reference, area, leaf = "https://doi.org/10.1145/325334.325242", "reuse", "C2a"
    needs = Needs(access="weights", data="none", models=(2, 2))

    t: float = 0.5

    def __post_init__(self) -> None:
        self.require(0 <= self.t <= 1, "t", "0 <= t <= 1")

    @property
    @override
    def reads_base(self) -> bool:
        return False

    @override
    def beside(self, num_experts: int) -> int:
        return 2

    @override
    def merge(
        self,
        name: str,
        base: Float[Tensor, "*shape"],
        experts: Float[Tensor, "experts *shape"],
        found: Mapping[str, Tensor],
    ) -> Float[Tensor, "*shape"]:
        one, other = experts[0], experts[1]
        left, walked = _shares(one, other, self.t)
        walk = one * left
        return walk.add_(other * walked)


def _shares(one: Tensor, other: Tensor, t: float) -> tuple[float, float]:
    """What the two vectors are multiplied with."""
    lengths = _product(one, one).sqrt(), _product(other, other).sqrt()
    unit = [length if length > SMALLEST else torch.ones_like(length) for length in lengths]
    cosine = (_product(one, other) / (unit[0] * unit[1])).clamp(-1, 1)
    if cosine.abs() > PARALLEL:
        return 1 - t, t
    angle = cosine.acos()
    return float(((1 - t) * angle).sin() / angle.sin()), float((t * angle).sin() / angle.sin())


def _product(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of two parameters, added up block by block, so that it is the same in every process."""
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    flat, also = one.reshape(-1), other.reshape(-1)
    for first in range(0, flat.numel(), BLOCK):
        total += (flat[first : first + BLOCK] * also[first : first + BLOCK]).sum()
    return total
