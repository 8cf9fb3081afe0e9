"""Which axes of a network's tensors belong together: read off a plain chain of layers, or declared."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx, nn
from torch.nn import functional

from lfm.errors import LfmError, UnknownName
from lfm.networks import BATCHNORM

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Declared = Mapping[str, Sequence[tuple[str, int] | tuple[str, int, int]]]
"""By a group's name its axes, each a tensor, the axis, and how many places in a row a unit has there; 1 by default."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KNOWN = (nn.Linear, *CONVOLUTIONS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)
# What does the same to every unit, whichever place it stands at.
SAME = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Dropout)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
FUNCTIONS = {
    torch.relu,
    torch.tanh,
    torch.sigmoid,
    functional.relu,
    functional.leaky_relu,
    functional.gelu,
    functional.silu,
    functional.max_pool2d,
    functional.avg_pool2d,
    functional.adaptive_avg_pool2d,
}
METHODS = {"relu", "tanh", "sigmoid", "contiguous"}
CHAIN = "a plain chain of linear maps, convolutions and norms"
DECLARE = "Declare which axes belong together under groups."


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
        GroupError: An axis is not there or in two groups, or the units of a group differ in number.
    """
    spec = PermutationSpec({n: tuple(Axis(*a) for a in axes) for n, axes in groups.items()}, frozenset(carried))
    taken: dict[tuple[str, int], str] = {}
    for name, axes in spec.groups.items():
        where, fix = f"groups {name!r}", "Name each axis with its tensor and its number."
        if all(one.tensor in spec.carried for one in axes):
            raise GroupError(where, "it has no axis of a parameter", "one at least", fix)
        for one in axes:
            if one.tensor not in shapes:
                raise UnknownName("tensor", one.tensor, tuple(shapes))
            what, shape = f"axis {one.axis} of {one.tensor!r}", shapes[one.tensor]
            if not 0 <= one.axis < len(shape):
                raise GroupError(where, what, f"one of the {len(shape)} from 0 on of shape {shape}", fix)
            if one.repeats < 1 or shape[one.axis] % one.repeats:
                allowed = f"a number that divides its {shape[one.axis]} places"
                raise GroupError(where, f"{one.repeats} places of {what} for each unit", allowed, fix)
            if (other := taken.setdefault((one.tensor, one.axis), name)) != name:
                raise GroupError(where, f"{what}, which {other!r} has", "each axis in one group", fix)
            units, wanted = shape[one.axis] // one.repeats, spec.units(shapes)[name]
            if units != wanted:
                raise GroupError(where, f"{units} units along {what}", f"{wanted}, as along its first axis", fix)
    return spec


def chain(model: nn.Module) -> PermutationSpec:
    """The groups of a network whose layers follow one another, each named after the layer that computes its units.

    Nothing is computed: the network may have no memory for its weights.

    Raises:
        GroupError: It is no plain chain, or has no hidden units.
    """
    walk = _Walk(model, type(model).__name__)
    graph = _traced(model, walk.network)
    for node in graph.nodes:
        if node.op in ("get_attr", "output") or (node.op == "placeholder" and not node.users):
            continue
        walk.pass_through(node)
    if not walk.groups:
        raise GroupError(walk.network, "it has no hidden units", "two layers at least", "Give a deeper network.")
    buffers = {name for name, _ in model.named_buffers()}
    return PermutationSpec(dict(walk.groups), frozenset(buffers))


def _traced(model: nn.Module, network: str) -> fx.Graph:
    """What the network computes, operation by operation."""
    for name, part in model.named_modules():
        if next(part.parameters(recurse=False), None) is not None and type(part) not in KNOWN:
            what = f"{name!r} is of type {type(part).__name__}" if name else "it has parameters of its own"
            raise GroupError(network, what, CHAIN, DECLARE)
    try:
        return fx.Tracer().trace(model)
    except (RuntimeError, TypeError, ValueError) as problem:  # what its code may do with a stand-in for its input
        what = f"what it computes depends on its input ({problem})".replace("\n", " ")
        raise GroupError(network, what, CHAIN, DECLARE) from problem


@dataclass(slots=True)
class _Walk:
    """Goes along a chain and notes where the units of the layer before lie.

    Attributes:
        model: Whose chain.
        network: What messages call it.
        groups: Those of the layers that another layer follows.
        axes: Those of the last layer so far.
        last: The name of this layer.
        units: How many it computes.
        flat: Whether units lie along the last axis, not along the channels.
        strange: The first operation since then of which is not known what it does to units.
        spread: Whether flattening has given each unit several places.
    """

    model: nn.Module
    network: str
    groups: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    axes: list[Axis] = field(default_factory=list)
    last: str = ""
    units: int = 0
    flat: bool = False
    spread: bool = False
    strange: str = ""
    seen: set[str] = field(default_factory=set)

    def pass_through(self, node: fx.Node) -> None:
        """Take one operation."""
        flows = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(flows) != (node.op != "placeholder"):
            raise self._refused(f"{node.name!r} takes the outputs of {len(flows)} parts")
        if len(node.users) > 1:
            raise self._refused(f"what {node.name!r} gives goes to {len(node.users)} parts")
        part = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(part, (nn.Linear, *CONVOLUTIONS)):
            self._layer(str(node.target), part)
        elif not self.last or self._flattens(node, part) or self._norm(str(node.target), part):
            return
        elif not (isinstance(part, SAME) or self._keeps(node, part)):
            self.strange = self.strange or node.name

    def _keeps(self, node: fx.Node, part: nn.Module | None) -> bool:
        """Whether an operation does the same to every unit."""
        if isinstance(part, POOLS):
            return not self.flat
        method = node.op == "call_method" and node.target in METHODS
        return method or (node.op == "call_function" and node.target in FUNCTIONS)

    def _flattens(self, node: fx.Node, part: nn.Module | None) -> bool:
        """Whether it makes a row of all that an image has; then notes it."""
        whole = isinstance(part, nn.Flatten) and (part.start_dim, part.end_dim) == (1, -1)
        called = node.target == "flatten" or node.target is torch.flatten
        if not whole and not (called and node.args[1:] == (1,) and not node.kwargs):
            return False
        self.spread, self.flat = not self.flat or self.spread, True
        return True

    def _norm(self, name: str, part: nn.Module | None) -> bool:
        """Whether it scales each unit by a number of its own; then notes these."""
        if isinstance(part, BATCHNORM):
            size = part.num_features
        elif isinstance(part, nn.LayerNorm) and self.flat and len(part.normalized_shape) == 1:
            size = part.normalized_shape[0]
        else:
            return False
        held = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        self.axes += [Axis(f"{name}.{n}", 0, self._repeats(name, size)) for n, value in held if value.ndim]
        self._once(name)
        return True

    def _layer(self, name: str, part: nn.Module) -> None:
        """End one group, and begin the next."""
        weight = part.get_parameter("weight")
        dense = isinstance(part, nn.Linear)
        if getattr(part, "groups", 1) != 1:
            raise self._refused(f"{name!r} has groups of channels")
        self._once(name)
        if self.last:
            if self.strange:
                raise self._refused(f"{self.strange!r} stands between {self.last!r} and {name!r}")
            if dense != self.flat:
                raise self._refused(f"{name!r} follows {self.last!r} along another axis")
            self.groups[self.last] = (*self.axes, Axis(f"{name}.weight", 1, self._repeats(name, weight.shape[1])))
        self.axes = [Axis(f"{name}.{n}", 0) for n, _ in part.named_parameters(recurse=False)]
        self.last, self.units, self.flat, self.spread, self.strange = name, weight.shape[0], dense, False, ""

    def _repeats(self, name: str, size: int) -> int:
        """How many of `size` places each unit has."""
        repeats, rest = divmod(size, self.units)
        if rest or (repeats != 1 and not self.spread):
            raise self._refused(f"{name!r} takes {size} numbers of the {self.units} of {self.last!r}")
        return repeats

    def _once(self, name: str) -> None:
        if name in self.seen:
            raise self._refused(f"{name!r} is used twice")
        self.seen.add(name)

    def _refused(self, what: str) -> GroupError:
        return GroupError(self.network, what, CHAIN, DECLARE)
