"""Stacking of layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lfm.merging.base import Layer, Merge


@dataclass(frozen=True, kw_only=True, slots=True)
class Passthrough(Merge):
    """Build a model of another depth out of layers of the experts, as they are; it is trained on afterwards.

    1. Take the layers of each slice, in order; a layer may come twice.
    2. Multiply those of their parameters that are to be scaled.
    3. Take what lies outside of layers (embeddings, last norm, head) from the base.

    The result's layer at some place is `scale * experts[k]`, of the expert and layer that the slice has there.

    Attributes:
        slices: Expert, first layer and the one after the last of each slice, counted from 0; none of them stands for
            all layers of the first expert, then all of the second, and so on.
        scale: Multiplies parameters of layers, one number for all slices or one for each.
        scaled: Parts of names: only parameters of layers that have one in theirs are scaled, such as ``o_proj`` and
            ``down_proj`` at 0, which makes a repeated layer do nothing at first. None of them scales all.

    Differs from the paper:
        Its depth up-scaling stacks one model with itself, without the last 8 layers of the first copy and the first 8
        of the second; the training that follows is a step of its own. What lies before the layers and after them
        mergekit takes from the first slice's and the last slice's model, here it is the base's.

    Example:
        >>> up = Passthrough(slices=((0, 0, 2), (0, 1, 3)))
        >>> [place.layer for place in up.layers(1, 3)]
        [0, 1, 1, 2]

    Reference:
        Kim et al., "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling", NAACL 2024.
        https://arxiv.org/abs/2312.15166
    """

    reference, area, leaf = "arXiv:2312.15166", "reuse", "C2a"

    slices: tuple[tuple[int, int, int], ...] = ()
    scale: float | tuple[float, ...] = 1.0
    scaled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole = all(expert >= 0 and 0 <= first < end for expert, first, end in self.slices)
        self.require(whole, "slices", "an expert, a first layer and a later end in each, from 0")
        fits = not isinstance(self.scale, tuple) or len(self.scale) == len(self.slices)
        self.require(fits, "scale", "one number, or one for each of the slices")

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
        return 1

    @override
    def check(self, num_experts: int) -> None:
        known = all(expert < num_experts for expert, _, _ in self.slices)
        self.require(known, "slices", f"experts from 0 to {num_experts - 1}")

    @override
    def layers(self, num_experts: int, num_layers: int) -> Sequence[Layer]:
        self.check(num_experts)
        known = all(end <= num_layers for _, _, end in self.slices)
        self.require(known, "slices", f"layers from 0 to {num_layers}, the end")
        slices = self.slices or tuple((expert, 0, num_layers) for expert in range(num_experts))
        return [Layer(expert, layer) for expert, first, end in slices for layer in range(first, end)]

    @override
    def merge(
        self,
        name: str,
        base: Float[Tensor, "*shape"],
        experts: Float[Tensor, "experts *shape"],
        found: Mapping[str, Tensor],
    ) -> Float[Tensor, "*shape"]:
        if self.scaled and not any(part in name for part in self.scaled):
            return experts[0].clone()
        return experts[0] * self._scale(int(found["layer"]))

    def _scale(self, place: int) -> float:
        if not isinstance(self.scale, tuple):
            return self.scale
        ends = torch.tensor([end - first for _, first, end in self.slices]).cumsum(0)
        return self.scale[int((ends <= place).sum())]
