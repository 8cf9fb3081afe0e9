"""A change of a model's weights as something of its own: kept in a file, added to the weights, taken away again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm.errors import LfmError, ShapeError, UnknownName
from lfm.weights import Weights

STEM = "delta"
ADDED, LEFT, RIGHT = "added", "left", "right"


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of one matrix that has few independent rows: `left @ right`, in the shape in which it is stored."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        return self.left.shape[0], self.right.shape[1]

    def whole(self) -> Float[Tensor, "rows columns"]:
        """What is added, in float32."""
        return self.left.float() @ self.right.float()


@dataclass(frozen=True, slots=True)
class Dense:
    """A change of one parameter, whole."""

    added: Float[Tensor, "*shape"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return tuple(self.added.shape)

    def whole(self) -> Float[Tensor, "*shape"]:
        """What is added, in float32."""
        return self.added.float()


Change = LowRank | Dense
Delta = Mapping[str, Change]
"""What is added to each parameter that changes, by its name in the model."""


class DamagedDelta(LfmError, ValueError):
    """A file of changes that does not hold what such a file does."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where, self.what = where, what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected 'added', or 'left' and 'right', of each parameter. Make it again."


def write(delta: Delta, folder: Path) -> None:
    """Write changes into ``delta.safetensors``, in float32."""
    tensors: dict[str, Tensor] = {}
    for name, change in delta.items():
        parts = {LEFT: change.left, RIGHT: change.right} if isinstance(change, LowRank) else {ADDED: change.added}
        tensors |= {f"{name}.{part}": t.detach().float().cpu().contiguous() for part, t in parts.items()}
    save_file(tensors, folder / f"{STEM}.safetensors")


def read(folder: Path) -> dict[str, Change]:
    """The changes that `write` wrote.

    Raises:
        WeightsError: There is no such file, or it is damaged.
        DamagedDelta: A change lacks a part or has one too many.
    """
    weights = Weights(folder, STEM)
    return {name: _change(weights, held) for name, held in parts(folder, weights).items()}


def parts(folder: Path, weights: Weights) -> dict[str, dict[str, str]]:
    """What `write` wrote of each parameter, without reading it: by the parameter's name the key of each part.

    Args:
        folder: What messages call it.
        weights: Those of its file.

    Raises:
        DamagedDelta: A change lacks a part or has one too many.
    """
    found: dict[str, dict[str, str]] = {}
    for key in weights.headers:
        name, _, part = key.rpartition(".")
        found.setdefault(name, {})[part] = key
    for name, held in found.items():
        if held.keys() not in ({ADDED}, {LEFT, RIGHT}):
            raise DamagedDelta(str(folder), f"{name!r} with {' and '.join(sorted(held))}")
    return found


def _change(weights: Weights, held: Mapping[str, str]) -> Change:
    if ADDED in held:
        return Dense(weights.read(held[ADDED]))
    return LowRank(weights.read(held[LEFT]), weights.read(held[RIGHT]))


@torch.no_grad()
def add(model: nn.Module, delta: Delta) -> None:
    """Add changes to a model in place; its parameters get new tensors, and those that they had stay as they were.

    Raises:
        UnknownName: The model has no parameter of that name.
        ShapeError: It has another shape there.
    """
    parameters = dict(model.named_parameters())
    for name, change in delta.items():
        if name not in parameters:
            raise UnknownName("parameter", name, tuple(parameters))
        if change.shape != tuple(parameters[name].shape):
            fix = "Apply it to the model that it was made for."
            raise ShapeError(f"change of {name!r}", change.shape, tuple(parameters[name].shape), fix)
    for name, change in delta.items():
        was = parameters[name].data
        parameters[name].data = (was.float() + change.whole().to(was.device)).to(was.dtype)


@contextmanager
def applied(model: nn.Module, delta: Delta) -> Iterator[None]:
    """`add` while the block runs; afterwards every tensor is put back as it was, bit for bit."""
    saved = {name: p.data for name, p in model.named_parameters() if name in delta}
    add(model, delta)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in saved:
                parameter.data = saved[name]
