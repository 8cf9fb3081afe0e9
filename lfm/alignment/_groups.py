"""Which axes of a network's tensors belong together, so that its units can be permuted; as a user declares them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lfm.errors import LfmError, UnknownName

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Declared = Mapping[str, Sequence[tuple[str, int] | tuple[str, int, int]]]
"""By a group's name its axes, each a tensor, the axis, and how many places in a row a unit has there; 1 by default."""

FIX = "Name each axis with its tensor and its number."


class GroupError(LfmError, ValueError):
    """A network whose units cannot be told apart, or groups of axes that do not fit it."""

    def __init__(self, where: str, what: str, allowed: str, fix: str) -> None:
        super().__init__(where, what, allowed, fix)
        self.where, self.what, self.allowed, self.fix = where, what, allowed, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected {self.allowed}. {self.fix}"


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of a tensor along which a group's units lie.

    Attributes:
        tensor: Its name.
        axis: Counted from 0.
        repeats: How many places in a row each unit has: of a channel that was flattened its height x width.
    """

    tensor: str
    axis: int
    repeats: int = 1

    def permuted(self, value: Tensor, order: Int[Tensor, "units"]) -> Tensor:
        """The tensor with unit `order[i]` at place `i`."""
        places = order[:, None] * self.repeats + torch.arange(self.repeats)
        return value.index_select(self.axis, places.reshape(-1).to(value.device))

    def rows(self, value: Tensor) -> Float[Tensor, "units numbers"]:
        """The tensor as a row for each unit, with all that belongs to it."""
        moved = value.movedim(self.axis, 0)
        units = moved.shape[0] // self.repeats
        return moved.reshape(units, math.prod(value.shape) // units)


@dataclass(frozen=True, slots=True)
class PermutationSpec:
    """What a permutation of hidden units has to move together, so that the network computes the same.

    Attributes:
        groups: By the name of each group all axes along which its units lie.
        carried: Tensors that move with the others but say nothing of how alike units are: they are no parameters.
    """

    groups: Mapping[str, tuple[Axis, ...]]
    carried: frozenset[str] = frozenset()

    def units(self, shapes: Shapes) -> dict[str, int]:
        """How many each group has."""
        first = {name: axes[0] for name, axes in self.groups.items()}
        return {name: shapes[a.tensor][a.axis] // a.repeats for name, a in first.items()}


def declared(groups: Declared, shapes: Shapes, carried: Collection[str] = ()) -> PermutationSpec:
    """The groups that a user names. Whether a network computes the same then, shapes do not tell.

    Args:
        groups: By a name each.
        shapes: Of the network's tensors.
        carried: Those of them that are no parameters.

    Raises:
        UnknownName: A tensor is not there.
        GroupError: An axis is not there or twice, or the units of a group differ in number.
    """
    spec = PermutationSpec({n: tuple(Axis(*a) for a in axes) for n, axes in groups.items()}, frozenset(carried))
    taken: dict[tuple[str, int], str] = {}
    for name, axes in spec.groups.items():
        where = f"groups {name!r}"
        if all(one.tensor in spec.carried for one in axes):
            raise GroupError(where, "it has no axis of a parameter", "one at least", FIX)
        units = [_units(where, one, shapes) for one in axes]
        for one, number in zip(axes, units, strict=True):
            what = f"axis {one.axis} of {one.tensor!r}"
            if number != units[0]:
                allowed = f"{units[0]}, as along its first axis"
                raise GroupError(where, f"{number} units along {what}", allowed, FIX)
            if (one.tensor, one.axis) in taken:
                which = taken[one.tensor, one.axis]
                raise GroupError(where, f"{what}, which {which!r} has", "each axis once", FIX)
            taken[one.tensor, one.axis] = name
    return spec


def _units(where: str, one: Axis, shapes: Shapes) -> int:
    """How many lie along an axis."""
    if one.tensor not in shapes:
        raise UnknownName("tensor", one.tensor, tuple(shapes))
    what, shape = f"axis {one.axis} of {one.tensor!r}", shapes[one.tensor]
    if not 0 <= one.axis < len(shape):
        raise GroupError(where, what, f"one of the {len(shape)} from 0 on of shape {shape}", FIX)
    if one.repeats < 1 or shape[one.axis] % one.repeats:
        allowed = f"a number that divides its {shape[one.axis]} places"
        raise GroupError(where, f"{one.repeats} places of {what} for each unit", allowed, FIX)
    return shape[one.axis] // one.repeats
