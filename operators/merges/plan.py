"""Headers -> the work of a merge: what is written where, and in which pieces; pure, and the same on every machine.

Where a piece begins and ends follows from the parameter alone. So whoever merges it, and beside what, computes the
same values in the same order, and the files are the same byte for byte.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lfm.errors import LfmError
from lfm.merging.base import Layer, Merge
from lfm.weights import Header

MERGED = 1 << 17  # values of an expert that are merged at once: those of all experts fit into a core's own cache
SCANNED = 1 << 20  # that are scanned at once: what a scan returns takes memory too
PIECE = 1 << 24  # of one piece of the work

NUMBERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
PER_LAYER = ("layer_types", "mlp_layer_types", "attention_layers", "no_rope_layers", "layers_block_type")


class NoLayers(LfmError, ValueError):
    """A model whose layers are to be stacked, and which has none that are numbered."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where, self.what = where, what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected layers with numbers from 0 in their names. Stack other models."


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter of the merged model.

    Attributes:
        source: Its name in the base and in the experts.
        stored: What it is in the base.
        header: What it will be.
        experts: Those of which it is made, by their numbers; none where it is the base's.
        layer: The number of its layer, where layers are stacked.
    """

    source: str
    stored: Header
    header: Header
    experts: tuple[int, ...]
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of a parameter: values that one thread reads, merges and writes, one stretch after another.

    Attributes:
        name: The parameter's, in the merged model.
        first: The number of its first value.
        end: That of the one after its last.
        stretch: Values at once; all of them where a method has to see a parameter whole.
    """

    name: str
    first: int
    end: int
    stretch: int

    def stretches(self) -> Iterator[tuple[int, int]]:
        """First and end of each."""
        for first in range(self.first, self.end, max(1, self.stretch)):
            yield first, min(first + self.stretch, self.end)


def targets(
    source: Mapping[str, Header], method: Merge, num_experts: int, *, dtype: torch.dtype | None, num_layers: int = 0
) -> dict[str, Target]:
    """The parameters of the merged model by name.

    Args:
        source: Those of the base.
        method: Merges them.
        num_experts: How many experts there are.
        dtype: Of what is a number with a fraction; None keeps each as it is.
        num_layers: What the base's config says, where it does.

    Raises:
        NoLayers: The method stacks layers, and the base has none.
        HyperparameterError: It names some that the base or its experts do not have.
    """
    stacked = _stacked(source, method, num_experts, num_layers)
    if stacked is None:
        every = tuple(range(num_experts))
        return {n: _target(n, h, dtype, every if h.dtype.is_floating_point else ()) for n, h in source.items()}
    prefix, layers = stacked
    inner = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.+)")
    found = {n: _target(n, h, dtype, ()) for n, h in source.items() if not inner.fullmatch(n)}
    by_layer: dict[int, list[tuple[str, str]]] = {}
    for name in source:
        if match := inner.fullmatch(name):
            by_layer.setdefault(int(match[1]), []).append((match[2], name))
    for place, layer in enumerate(layers):
        for rest, name in by_layer[layer.layer]:
            experts = (layer.expert,) if source[name].dtype.is_floating_point else ()
            found[f"{prefix}.{place}.{rest}"] = _target(name, source[name], dtype, experts, place)
    return found


def _target(
    name: str, stored: Header, dtype: torch.dtype | None, experts: tuple[int, ...], layer: int | None = None
) -> Target:
    kept = dtype is None or not stored.dtype.is_floating_point
    header = stored if kept or dtype is None else Header(stored.shape, dtype)
    return Target(name, stored, header, experts, layer)


def _stacked(
    source: Mapping[str, Header], method: Merge, num_experts: int, num_layers: int
) -> tuple[str, Sequence[Layer]] | None:
    """What comes before the number of a layer in names, and the layers of the merged model."""
    prefix, number = layers_of(source, num_layers)
    layers = method.layers(num_experts, number)
    if layers is None:
        return None
    if not number:
        raise NoLayers("base", "no parameter has a layer's number in its name")
    return prefix, layers


def layers_of(names: Mapping[str, Header] | Sequence[str], num_layers: int = 0) -> tuple[str, int]:
    """What comes before the number of a layer in a model's names, and how many layers it has; none are 0.

    Args:
        names: Of all parameters.
        num_layers: What the config says: where there are several runs of numbers, as in a model that also sees, the
            one with so many is meant, else the longest.
    """
    runs: dict[str, set[int]] = {}
    for name in names:
        if match := re.match(r"(.+?)\.(\d+)\.", name):  # the outermost number: experts within a layer have one too
            runs.setdefault(match[1], set()).add(int(match[2]))
    whole = {prefix: len(found) for prefix, found in runs.items() if found == set(range(len(found)))}
    return max(whole.items(), key=lambda run: (run[1] == num_layers, run[1]), default=("", 0))


def stacked_config(config: Mapping[str, object], layers: Sequence[Layer]) -> dict[str, object]:
    """A config for other layers: their number, and every list that says something of each."""
    inner = config.get("text_config")
    changed = dict(config)
    if isinstance(inner, Mapping):
        changed["text_config"] = stacked_config(inner, layers)
    for key in NUMBERS:
        if key in config:
            changed[key] = len(layers)
    for key in PER_LAYER:
        said = config.get(key)
        if isinstance(said, list):
            changed[key] = [said[layer.layer] for layer in layers]
    return changed


def num_layers_of(config: Mapping[str, object]) -> int:
    """How many layers a config says that its model has; 0 where it does not."""
    inner = config.get("text_config")
    said = next((config[key] for key in NUMBERS if key in config), 0)
    if not said and isinstance(inner, Mapping):
        return num_layers_of(inner)
    return said if isinstance(said, int) else 0


def pieces(name: str, target: Target, *, elementwise: bool, at_once: int) -> Iterator[Piece]:
    """The work on one parameter.

    Args:
        name: In the merged model.
        target: What it is.
        elementwise: Whether it may be taken apart.
        at_once: Values of a stretch: as many whole rows as these fill, one at least.
    """
    size = target.header.size
    if target.experts and not elementwise:
        yield Piece(name, 0, size, size)
        return
    columns = target.header.shape[-1] if len(target.header.shape) > 1 else 1
    stretch = max(1, at_once // max(1, columns)) * columns
    piece = max(1, PIECE // max(1, stretch)) * stretch
    for first in range(0, size, max(1, piece)):
        yield Piece(name, first, min(first + piece, size), stretch)


def bundles(work: Sequence[Piece], number: int) -> list[list[int]]:
    """Numbers of pieces, in order, in about `number` bundles of as many values each."""
    total = sum(p.end - p.first for p in work)
    found: list[list[int]] = [[]]
    filled = 0
    for i, piece in enumerate(work):
        if found[-1] and filled * number >= total * len(found):
            found.append([])
        found[-1].append(i)
        filled += piece.end - piece.first
    return found if work else []


def memory(piece: Piece, target: Target, method: Merge, measured: int = 0) -> int:
    """The most bytes that are held at once to merge or scan a piece.

    Args:
        piece: What is done.
        target: Its parameter.
        method: Merges it.
        measured: Bytes of what was measured of it.
    """
    values = min(piece.stretch, piece.end - piece.first)
    kept = target.stored.dtype.itemsize + target.header.dtype.itemsize
    if not target.experts:
        return values * kept
    floats = 1 + len(target.experts) + method.beside(len(target.experts)) + 1  # base, experts, ..., a change of them
    return values * (4 * floats + kept) + measured
