"""The contract every alignment method keeps, and the way between two models."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from lfm.alignment._chain import chain
from lfm.alignment._groups import (
    Axis as Axis,
    Declared as Declared,
    GroupError as GroupError,
    PermutationSpec as PermutationSpec,
    Tensors as Tensors,
    declared as declared,
)
from lfm.method import Method, Needs


@dataclass(frozen=True, slots=True)
class Permutations:
    """An order of the units of every group.

    Attributes:
        spec: The groups.
        orders: By each one's name which unit comes to each place: int64 of shape (units,).
    """

    spec: PermutationSpec
    orders: Mapping[str, Tensor]

    @classmethod
    def none(cls, spec: PermutationSpec, tensors: Tensors) -> Self:
        """Those that leave every unit where it is."""
        units = spec.units({name: tuple(value.shape) for name, value in tensors.items()})
        return cls(spec, {name: torch.arange(number) for name, number in units.items()})

    def apply(self, tensors: Tensors) -> dict[str, Tensor]:
        """A network's tensors with its units in these orders: it computes the same.

        Args:
            tensors: By name, of any dtype; those that no group touches are given back as they are.
        """
        found = dict(tensors)
        for name, axes in self.spec.groups.items():
            for axis in axes:
                found[axis.tensor] = axis.permuted(found[axis.tensor], self.orders[name])
        return found

    def moved(self) -> float:
        """The share of units that change their place."""
        places = sum(len(order) for order in self.orders.values())
        return sum(int((o != torch.arange(len(o))).sum()) for o in self.orders.values()) / places


class Align(Method, ABC):
    """Finds the order of a network's hidden units in which it is most like another of the same architecture.

    A network computes the same in whatever order its hidden units stand, so two that learnt the same may be far apart.
    In the order that is found the straight way between both (`at`) need not lead over a barrier of loss (`barrier`).
    """

    __slots__ = ()
    needs = Needs(access="weights", data="none", models=(2, 2))

    def groups(self, model: nn.Module) -> PermutationSpec:
        """Which axes of which tensors are permuted together, for a network whose layers follow one another.

        Units lie along the rows of the layer that computes them, along its bias, along what normalises them, and along
        the columns of the next layer. What goes in and what comes out keeps its order. Of another network `declared`
        takes the groups from a user.

        Args:
            model: May have no memory for its weights; only what its modules do is looked at.

        Raises:
            GroupError: It is no plain chain: with attention or a residual stream, units of several layers belong
                together.
        """
        return chain(model)

    @abstractmethod
    def solve(self, a: Tensors, b: Tensors, spec: PermutationSpec, draw: torch.Generator) -> Permutations:
        """The order of the units of `b` in which it is most like `a`.

        Args:
            a: The tensors of the network that stays, by name; floating-point. Neither is modified.
            b: Those of the one that is permuted, of the same names and shapes.
            spec: The groups of both.
            draw: What is random comes from it.
        """


def at(ends: Sequence[Tensors], t: float) -> dict[str, Tensor]:
    """The point at `t` of the straight way between two models: `(1 - t) * ends[0] + t * ends[1]`.

    Args:
        ends: Two models' tensors, of the same names and shapes.
        t: 0 gives the first, 1 the second one, both exactly.

    Returns:
        Tensors in the first one's dtypes; integers are the first one's.
    """
    first, second = ends
    return {
        name: (value.double().lerp(second[name].double(), t)).to(value.dtype) if value.is_floating_point() else value
        for name, value in first.items()
    }


def barrier(points: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """How far the loss on a way between two models rises above the straight line between its losses at both ends.

    With `t = points[i]` it rises by `losses[i] - ((1 - t) * losses[0] + t * losses[-1])`.

    Args:
        points: Values of t from 0 to 1, both among them, in order.
        losses: Those there.

    Returns:
        The largest rise, which is never below 0, and where on the way it is.

    Example:
        >>> barrier([0.0, 0.25, 1.0], [1.0, 4.0, 3.0])
        (2.5, 0.25)
    """
    rises = [x - ((1 - t) * losses[0] + t * losses[-1]) for t, x in zip(points, losses, strict=True)]
    highest = max(rises)
    return highest, points[rises.index(highest)]
