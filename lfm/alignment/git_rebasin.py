"""Git Re-Basin, by matching weights."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from typing_extensions import override

from lfm.alignment.base import Align, Axis, Permutations, PermutationSpec, Tensors

ROUNDING = 1e-12  # of what two models can agree at most: a smaller gain may be none


@dataclass(frozen=True, kw_only=True, slots=True)
class GitReBasin(Align):
    """Permute a network's hidden units so that its weights are as near to those of another one as can be.

    With `a` the tensors of the network that stays and `b` those of the other one, and all orders as they are at first:

    1. Pick. Go through the groups of units in a random order, one after the other.
    2. Compare. `products[i, j]` is the scalar product of all that belongs to unit `i` of `a` with what belongs to unit
       `j` of `b`: its row and bias, its scale and shift, its column in the next layer; other groups in their orders.
    3. Assign. The group's order is the one of all permutations with the largest sum of `products[i, order[i]]`.
    4. Repeat until no group gains.

    The result is an order of each group that is best while the others stay, where
    `agreement = sum((a[name] * permuted(b)[name]).sum() for name in a)` has risen with every update.

    Attributes:
        max_sweeps: How often it goes through all groups at most, at least 1; it nearly always ends by itself before.

    Differs from the paper:
        Where a group lies along two axes of one tensor, as where a residual stream is declared, an assignment is no
        longer the best step; as in the authors' code the other axis stays as it is meanwhile, but a step after which
        both agree less is not taken. As there, what batch normalisation has seen is no parameter and does not count;
        here it moves along, so that the network computes the same, where theirs measures it anew after the average.

    Example:
        >>> a = {"in.weight": torch.tensor([[1.0], [2.0], [3.0]]), "out.weight": torch.tensor([[4.0, 5.0, 6.0]])}
        >>> b = {"in.weight": torch.tensor([[3.0], [1.0], [2.0]]), "out.weight": torch.tensor([[6.0, 4.0, 5.0]])}
        >>> spec = PermutationSpec({"in": (Axis("in.weight", 0), Axis("out.weight", 1))})
        >>> found = GitReBasin().solve(a, b, spec, torch.Generator())
        >>> found.orders["in"], found.apply(b)["out.weight"]
        (tensor([1, 2, 0]), tensor([[4., 5., 6.]]))

    Reference:
        Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023.
        https://arxiv.org/abs/2209.04836
    """

    reference, area, leaf = "arXiv:2209.04836", "reuse", "C2b"

    max_sweeps: int = 100

    def __post_init__(self) -> None:
        self.require(self.max_sweeps >= 1, "max_sweeps", "max_sweeps >= 1")

    @override
    def solve(self, a: Tensors, b: Tensors, spec: PermutationSpec, draw: torch.Generator) -> Permutations:
        found = Permutations.none(spec, b)
        names = tuple(spec.groups)
        for _ in range(self.max_sweeps):
            before = found
            for number in torch.randperm(len(names), generator=draw).tolist():
                found = improved(a, b, found, names[number])
            if found is before:
                break
        return found


def improved(a: Tensors, b: Tensors, found: Permutations, group: str) -> Permutations:
    """`found` with the best order of one group while the others stay, or itself where nothing is gained."""
    touched = {axis.tensor for axis in found.spec.groups[group]} - found.spec.carried
    order = assigned(products(a, b, found, group))
    better = replace(found, orders={**found.orders, group: order})
    most = sum(float(a[n].double().norm() * b[n].double().norm()) for n in touched)
    parts = {n: b[n] for n in touched}
    gain = agreement(a, parts, better) - agreement(a, parts, found)
    return better if gain > ROUNDING * most else found


def products(a: Tensors, b: Tensors, found: Permutations, group: str) -> Float[Tensor, "units units"]:
    """How alike each unit of `a` is to each of `b`, in float64, with other groups in their orders."""
    parts = []
    for axis in found.spec.groups[group]:
        if axis.tensor not in found.spec.carried:
            others = _permuted(axis.tensor, b[axis.tensor].double(), found, but=axis)
            parts.append(axis.rows(a[axis.tensor].double()) @ axis.rows(others).T)
    return torch.stack(parts).sum(dim=0)


def assigned(products: Float[Tensor, "units units"]) -> Int[Tensor, "units"]:
    """The permutation with the largest sum of `products[i, order[i]]`."""
    _, columns = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).long()


def agreement(a: Tensors, b: Tensors, found: Permutations) -> float:
    """The scalar product of two networks' parameters, of those that are in `b`, the second one's units in an order."""
    names = [name for name in b if name not in found.spec.carried]
    return sum(float((a[n].double() * _permuted(n, b[n].double(), found)).sum()) for n in names)


def _permuted(name: str, value: Tensor, found: Permutations, *, but: Axis | None = None) -> Tensor:
    """One tensor with all its units in their orders, but along one axis as they are."""
    for group, axes in found.spec.groups.items():
        for axis in axes:
            if axis.tensor == name and axis != but:
                value = axis.permuted(value, found.orders[group])
    return value
