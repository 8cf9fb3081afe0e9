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
    parts: dict[str, dict[str, Tensor]] = {}
    for key in weights.headers:
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = weights.read(key)
    found: dict[str, Change] = {}
    for name, held in parts.items():
        if held.keys() == {ADDED}:
            found[name] = Dense(held[ADDED])
        elif held.keys() == {LEFT, RIGHT}:
            found[name] = LowRank(held[LEFT], held[RIGHT])
        else:
            raise DamagedDelta(str(folder), f"{name!r} with {' and '.join(sorted(held))}")
    return found


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
