"""A frozen teacher beside a training student: asked for every batch, or once for each row, or only quoted."""

import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lfm.soft_targets import Dense, Joint, TopK, Whole, likeliest
from operators.data.batches import IGNORED, Batch, Rows
from operators.models.language_models import Head, Heads, heads_of
from operators.models.objectives import answers


class Source(Protocol):
    """What a student learns from."""

    def says(self, batch: Batch) -> Whole | TopK:
        """What is said of the loss tokens of a batch."""


class Teacher:
    """Says of each loss token how likely each successor is. No module: nothing of it is trained, moved or saved.

    Attributes:
        asked: Rows that went through the model so far.
    """

    def __init__(self, model: Any, *, temperature: float, packed: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = heads_of(model)
        self.temperature, self.packed = temperature, packed
        self.asked = 0
        self.memories: list[_Memory] = []

    def remember(self, rows: Rows, k: int, vocabulary: int, folder: Path) -> None:
        """From now on ask only once for each of these rows, and keep the `k` likeliest tokens, in a file."""
        self.memories.append(_Memory(rows, k, vocabulary, self.temperature, folder))

    def says(self, batch: Batch) -> Whole | TopK:
        """What it says of the loss tokens of a batch."""
        memory = next((m for m in self.memories if m.rows is batch.rows), None)
        if memory is None or not batch.loss_tokens:
            return self.asked_of(batch)
        new = np.flatnonzero(~memory.met[batch.where])
        if len(new):
            memory.keep(batch.where[new], likeliest(self.asked_of(_some(batch, new)), memory.k, memory.vocabulary))
        return memory.recall(batch.where, batch.ids.device)

    @torch.no_grad()
    def asked_of(self, batch: Batch) -> Whole:
        """What it says of them now, whatever is remembered."""
        self.asked += len(batch.where)
        hidden, _ = answers(self.model, batch, packed=self.packed)
        if isinstance(self.head, Heads):
            each = zip(self.head.heads, self.head.parts(hidden), strict=True)
            said = [_dense(head, part, temperature=1.0) for head, part in each]
            return Joint(members=said, combine=self.head.combine, temperature=self.temperature)
        return _dense(self.head, hidden, temperature=self.temperature)


def _dense(head: Head, hidden: Tensor, *, temperature: float) -> Dense:
    """What a head says of hidden states."""
    linear, shaped = head.linear, None if head.plain else head.shaped
    return Dense(hidden=hidden, weight=linear.weight, bias=linear.bias, shaped=shaped, temperature=temperature)


class Quoted:
    """A teacher of whom there are only answers: what it wrote is all that it would have said at that place."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def says(self, batch: Batch) -> TopK:
        """What it says of the loss tokens of a batch."""
        written = batch.targets[batch.targets != IGNORED][:, None]
        sure = torch.tensor([0.0, float("-inf")], device=written.device)
        return TopK(written, sure.expand(len(written), 2), self.vocabulary, 1.0)


class _Memory:
    """The likeliest tokens at each loss token of rows, in a file without a name that goes with the process.

    A token takes 4 * k + 2 bytes where 16 bits can number the vocabulary, else 6 * k + 2: log-probabilities are
    float16, which is off by less than 0.4 % of a probability down to exp(-16).
    """

    def __init__(self, rows: Rows, k: int, vocabulary: int, temperature: float, folder: Path) -> None:
        self.rows, self.k, self.vocabulary, self.temperature = rows, k, vocabulary, temperature
        self.starts = np.concatenate([[0], (rows.targets != IGNORED).sum(axis=1).cumsum()])
        self.met = np.zeros(len(rows), bool)
        self.tokens = unnamed(folder, np.dtype(np.min_scalar_type(vocabulary - 1)), (rows.loss_tokens, k))
        self.shares = unnamed(folder, np.dtype(np.float16), (rows.loss_tokens, k + (k < vocabulary)))

    def keep(self, where: "np.ndarray[Any, np.dtype[np.int64]]", said: TopK) -> None:
        """Remember what was said of these rows, one after another."""
        places = self._places(where)
        self.tokens[places] = said.tokens.cpu().numpy()
        self.shares[places] = said.shares.cpu().numpy()
        self.met[where] = True

    def recall(self, where: "np.ndarray[Any, np.dtype[np.int64]]", device: torch.device) -> TopK:
        """What was said of these rows, one after another."""
        places = self._places(where)
        tokens = torch.from_numpy(self.tokens[places].astype(np.int32)).to(device)
        return TopK(tokens, torch.from_numpy(self.shares[places]).to(device), self.vocabulary, self.temperature)

    def _places(self, where: "np.ndarray[Any, np.dtype[np.int64]]") -> "np.ndarray[Any, np.dtype[np.int64]]":
        return np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in where])


def unnamed(folder: Path, dtype: "np.dtype[Any]", shape: tuple[int, int]) -> "np.memmap[Any, np.dtype[Any]]":
    """An array in a file that goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)  # a worker on another machine has only the path
    with tempfile.TemporaryFile(dir=folder) as file:  # the map keeps it open
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def _some(batch: Batch, which: "np.ndarray[Any, np.dtype[np.int64]]") -> Batch:
    at = torch.from_numpy(which).to(batch.ids.device)
    return Batch(batch.ids[at], batch.positions[at], batch.targets[at], batch.where[which], batch.rows)
