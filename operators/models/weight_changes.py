"""What becomes of one parameter of a base, out of an adapter's file or a delta's: read in stretches, never whole."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lfm import deltas
from lfm.errors import ShapeError
from lfm.weights import Weights, parsed

Values = Callable[[int, Tensor, Tensor], None]
"""Writes a stretch of an expert's value of a parameter into the last tensor, in float32, given where the stretch begins
in the flat parameter and the base's values there. It begins and ends with rows (of the last dimension) of a matrix."""


def unchanged(first: int, base: Tensor, out: Tensor) -> None:
    """What a parameter becomes that nothing changes."""
    out.copy_(base)


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one parameter: it is replaced by `whole` if there is one, then all the rest is added.

    Attributes:
        weights: Where its parts are.
        shape: The parameter's.
        whole: Name of what replaces it.
        added: Name of what is added as it is.
        low: Name of the matrix with as many rows as the rank; `scale * high @ low` is added.
        high: Name of the one with as many columns.
        scale: Multiplies their product.
        transposed: Whether the parameter is stored the other way round.
    """

    weights: Weights
    shape: tuple[int, ...]
    whole: str = ""
    added: str = ""
    low: str = ""
    high: str = ""
    scale: float = 1.0
    transposed: bool = False

    @contextmanager
    def opened(self) -> Iterator[Values]:
        """What the parameter becomes, while the block runs."""
        with ExitStack() as files:
            whole, added = (
                files.enter_context(self.weights.opened(n)) if n else None for n in (self.whole, self.added)
            )
            low, high = (self.weights.read(n).float() if n else None for n in (self.low, self.high))
            if low is not None and high is not None and self.transposed:
                low, high = high.T, low.T

            def values(first: int, base: Tensor, out: Tensor) -> None:
                if whole is not None:
                    whole.values(first, out)
                else:
                    out.copy_(base)
                if added is not None:
                    out += added.raw(first, out.numel()).view(out.shape).float()
                if low is not None and high is not None:
                    columns = low.shape[1]
                    rows = slice(first // columns, (first + out.numel()) // columns)
                    out += (high[rows] @ low).mul_(self.scale).view(out.shape)

            yield values


def read_delta(folder: Path) -> dict[str, Change]:
    """Every parameter that a delta changes, by its name in the base; reads headers only.

    Raises:
        WeightsError: It is damaged.
        DamagedDelta: It lacks a part of a change.
        ShapeError: The parts of one do not fit together.
    """
    weights = Weights(folder, deltas.STEM)
    return {name: _change(str(folder), weights, held) for name, held in deltas.parts(folder, weights).items()}


def base_of(folder: Path) -> str:
    """The digest of the model that a delta changes; empty where it does not say.

    Raises:
        WeightsError: What should say it is no JSON object.
    """
    path = folder / "delta.json"
    return str(parsed(path, path.read_bytes()).get("base") or "") if path.is_file() else ""


def _change(where: str, weights: Weights, held: Mapping[str, str]) -> Change:
    if deltas.ADDED in held:
        return Change(weights, weights.headers[held[deltas.ADDED]].shape, added=held[deltas.ADDED])
    high, low = held[deltas.LEFT], held[deltas.RIGHT]
    left, right = weights.headers[high].shape, weights.headers[low].shape
    if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
        raise ShapeError(f"{where} {low!r}", right, (*left[1:2], *right[1:2]), "Make the delta again.")
    return Change(weights, (left[0], right[1]), low=low, high=high)
