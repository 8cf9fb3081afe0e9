"""What is measured of a model on data: sums over rows that several methods need, taken in one pass.

What a kind observes in one batch is a sum over its rows, by name; sums of batches are added, and nothing else is done
to them before the end. So rows may be cut into parts, the parts observed anywhere, and their sums added in order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lfm.chunks import chunk_size
from lfm.errors import LfmError
from lfm.hooks import Blocks, NoBlocks, inputs_of

Labels = Literal["sampled", "exact", "data"]
Modules = Literal["keys", "all"]
FISHER, GRAM = "fisher", "gram"
KINDS = (FISHER, GRAM)
"""Every kind by the word that a pipeline and `Needs.statistics` use for it."""
TOKENS_PER_WIDTH = 20
"""Tokens that a Gram matrix needs for each of its columns if it shall be inverted."""


class ManyLabels(LfmError, ValueError):
    """Rows with so many labels that the outcomes cannot all be gone through."""

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self.places = places

    def __str__(self) -> str:
        return (
            f"labels='exact': {self.places} labels in a row, expected one, as a classifier has. Draw them ('sampled')."
        )


class Outcomes(Protocol):
    """What a model says of a batch: a distribution over classes at each place that has a label (a token, a row)."""

    @property
    def labels(self) -> Int[Tensor, "places"]:
        """What the data say."""

    def logits(self, where: slice) -> Float[Tensor, "places classes"]:
        """Unnormalised log-probabilities of some places, in float32."""

    def log_likelihood(self, labels: Int[Tensor, "places"]) -> Float[Tensor, ""]:
        """The summed log-probability of labels, with a gradient where it is on."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A batch that a model has read.

    Attributes:
        rows: The rows' numbers among all that are measured.
        read: Which tokens count: padding does not, nor what comes after the last place that has a label.
        inputs: What went into each matrix that is watched, by its name, with padding.
        outcomes: What the model says.
    """

    rows: Sequence[int]
    read: Bool[Tensor, "rows length"]
    inputs: Mapping[str, Tensor]
    outcomes: Outcomes


class Statistic(ABC):
    """One kind of statistics.

    Attributes:
        kind: The word for it.
        row_by_row: Whether a batch has to be a single row, with gradients on.
    """

    kind: ClassVar[str]
    row_by_row: ClassVar[bool]

    def watched(self, model: nn.Module) -> tuple[str, ...]:
        """The matrices whose inputs it wants to see, by name.

        Raises:
            NoBlocks: The model has none of them.
        """
        return ()

    @abstractmethod
    def observe(self, model: nn.Module, seen: Seen) -> dict[str, Tensor]:
        """The sums over the rows of one batch, by name, in float32."""

    def finish(self, total: Tensor, rows: int) -> Tensor:
        """What is kept of the sum over all rows."""
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Fisher(Statistic):
    """The diagonal of the Fisher information: how much each parameter matters for what the model says.

    For each row it is the squared gradient of `log p(labels | row)` with labels drawn from the model, and the mean over
    rows is kept, in the parameter's shape. Squares are of single rows: that of a batch's gradient is something else.

    The labels of a row with several places (tokens) are drawn one by one, each given the row's own text. Then the
    gradients of their log-probabilities have mean 0 and are independent of each other, so that the square of their sum
    is on average the sum of their squares: one gradient for a row estimates without bias what one for each token would.

    Attributes:
        labels: ``sampled`` draws each label once; ``exact`` takes the expectation over all classes, for rows with one
            label; ``data`` takes the data's own (the empirical Fisher, in which a row's tokens are not independent).
        seed: Of the draws, which depend on it and on the row's number alone.
    """

    kind = FISHER
    row_by_row = True

    labels: Labels = "sampled"
    seed: int = 0

    @override
    def observe(self, model: nn.Module, seen: Seen) -> dict[str, Tensor]:
        named = dict(model.named_parameters())
        sums = {f"{FISHER}/{n}": torch.zeros_like(p, dtype=torch.float32) for n, p in named.items()}
        for weight, labels in self._chosen(seen):
            score = seen.outcomes.log_likelihood(labels)
            gradients = torch.autograd.grad(score, list(named.values()), retain_graph=True, allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:  # a parameter that nothing of this row passes has none
                    total.addcmul_(gradient.float(), gradient.float(), value=weight)
        return sums

    @override
    def finish(self, total: Tensor, rows: int) -> Tensor:
        return total / rows

    def _chosen(self, seen: Seen) -> Iterator[tuple[float, Tensor]]:
        """Labels for the row, each with its weight."""
        assert len(seen.rows) == 1, seen.rows
        known = seen.outcomes.labels
        if self.labels == "data":
            yield 1.0, known
        elif self.labels == "sampled":
            yield 1.0, drawn(seen.outcomes, len(known), (self.seed, seen.rows[0]))
        else:
            if len(known) != 1:
                raise ManyLabels(len(known))
            with torch.no_grad():
                shares = seen.outcomes.logits(slice(0, 1))[0].softmax(dim=-1).tolist()
            for label, share in enumerate(shares):
                yield share, torch.full_like(known, label)


@torch.no_grad()
def drawn(outcomes: Outcomes, places: int, seed: Sequence[int]) -> Int[Tensor, "places"]:
    """One label for each place from the model's distribution; which, the seed decides, whatever is computed where."""
    points = torch.from_numpy(np.random.default_rng(tuple(seed)).random(places))
    first = outcomes.logits(slice(0, 1))
    size = chunk_size(first.shape[-1], first.device)
    found = []
    for start in range(0, places, size):
        where = slice(start, min(places, start + size))
        passed = outcomes.logits(where).double().softmax(dim=-1).cumsum(dim=-1)
        wanted = points[where, None].to(passed.device) * passed[:, -1:]
        found.append(torch.searchsorted(passed, wanted, right=True)[:, 0].clamp(max=passed.shape[1] - 1))
    return torch.cat(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gram(Statistic):
    """What goes into matrices, as the sum over tokens of `x x^T`: their second moment times the number of tokens.

    Products are of whole batches in float32. Matrices that read the same thing are measured once and written each.

    Attributes:
        modules: ``keys`` measures what goes into the last matrix of each MLP, ``all`` what goes into every matrix of
            every layer.
        layers: Only these layers, counted from 0; None takes all.
    """

    kind = GRAM
    row_by_row = False

    modules: Modules = "keys"
    layers: tuple[int, ...] | None = None

    @override
    def watched(self, model: nn.Module) -> tuple[str, ...]:
        blocks = Blocks(model)
        layers = range(len(blocks)) if self.layers is None else self.layers
        beyond = [i for i in layers if not 0 <= i < len(blocks)]
        if beyond:
            raise NoBlocks(type(model).__name__, f"layer {beyond[0]}", f"one of its layers 0 to {len(blocks) - 1}")
        if self.modules == "keys":
            return tuple(blocks[i].mlp_out for i in layers)
        return tuple(name for i in layers for name in blocks.matrices(i))

    @override
    def observe(self, model: nn.Module, seen: Seen) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        done: dict[int, Tensor] = {}
        for name, into in seen.inputs.items():
            if id(into) not in done:
                tokens = self._read(name, into.detach(), seen.read).float()
                done[id(into)] = tokens.T @ tokens
            sums[f"{GRAM}/{name}"] = done[id(into)]
        return sums

    def _read(self, name: str, into: Tensor, read: Tensor) -> Float[Tensor, "tokens width"]:
        flat = into.reshape(-1, into.shape[-1])  # some models lay the tokens of all rows one after the other
        if len(flat) != read.numel():
            what = f"{name!r} reads {len(flat)} vectors of {read.numel()} tokens"
            raise NoBlocks("model", what, "a matrix that reads every token")
        return flat[read.reshape(-1)]


class Observer:
    """Has one model read batches, and says what all kinds observe of each."""

    def __init__(self, model: nn.Module, statistics: Sequence[Statistic]) -> None:
        """Find what is watched.

        Args:
            model: In evaluation mode.
            statistics: The kinds.

        Raises:
            NoBlocks: A kind watches what the model does not have.
        """
        self.model = model
        self._watched = {s: s.watched(model) for s in statistics}
        self._names = tuple(dict.fromkeys(name for names in self._watched.values() for name in names))

    @property
    def row_by_row(self) -> bool:
        """Whether a batch has to be a single row."""
        return any(s.row_by_row for s in self._watched)

    def __call__(
        self, rows: Sequence[int], read: Bool[Tensor, "rows length"], ask: Callable[[], Outcomes]
    ) -> dict[str, Tensor]:
        """The sums over one batch.

        Args:
            rows: The numbers of its rows.
            read: Which of its tokens count.
            ask: Has the model read the batch.
        """
        with torch.set_grad_enabled(self.row_by_row):
            with inputs_of(self.model, self._names) as inputs:
                outcomes = ask()
            sums: dict[str, Tensor] = {}
            for statistic, names in self._watched.items():
                seen = Seen(rows, read, {n: inputs[n] for n in names}, outcomes)
                sums |= {name: total.detach() for name, total in statistic.observe(self.model, seen).items()}
        return sums
