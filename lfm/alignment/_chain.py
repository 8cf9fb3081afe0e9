"""Which axes of a network's tensors belong together, read off what it does where its layers follow one another."""

from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional

from lfm.alignment._groups import Axis, GroupError, PermutationSpec
from lfm.networks import BATCHNORM

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
