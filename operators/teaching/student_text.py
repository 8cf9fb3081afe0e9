"""Batches whose answers the student writes itself, as it is at that step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from operators.data.batches import IGNORED, Document, Rows, packed
from operators.engines.native import Native, Sampling
from operators.learning.loop import Place, Where
from operators.training import Training

TOGETHER = 64  # texts written at once; fixed, as the draws of a text depend on what is beside it
WRITES, DRAWS = 1, 2  # told apart from each other, and from the seeds of the loop


@dataclass(frozen=True, slots=True)
class Written(Rows):
    """Rows whose answers the student wrote: their tokens are no labels."""


class StudentText:
    """Replaces the answers of a share of the batches, drawn from the seed and the step.

    Every rank writes the whole batch, so that the text does not depend on how many there are; what the first one has
    written counts, as two devices may round differently.

    Attributes:
        batches: How many batches were written so far.
    """

    def __init__(
        self, model: Any, tokenizer: Any, rows: Rows, share: float, max_answer: int, training: Training, place: Place
    ) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.share, self.max_answer, self.training, self.place = share, max_answer, training, place
        self.batches = 0

    def __call__(self, step: int, where: Where) -> tuple[Rows, Where]:
        """The rows of a step: as they are, or as the student would go on from their prompts."""
        if np.random.default_rng((self.training.seed, step, WRITES)).random() >= self.share:
            return self.rows, where
        self.batches += 1
        said = [list(self._written(step, list(prompts(self.rows, where))))]
        if self.place.world > 1:
            torch.distributed.broadcast_object_list(said, src=0, device=self.place.device)
        made = packed(
            iter(said[0]),
            length=self.training.length,
            padding=self.tokenizer.pad_token_id,
            packing=self.training.packing,
            where=f"text that the student wrote at step {step + 1}",
        )
        return Written(made.ids, made.positions, made.targets), np.arange(len(made))

    def _written(self, step: int, asked: Sequence[list[int]]) -> Iterator[Document]:
        training = self.model.training
        engine = Native(self.model, self.tokenizer)
        for start in range(0, len(asked), TOGETHER):
            some = asked[start : start + TOGETHER]
            rooms = [min(self.max_answer, self.training.length - len(prompt)) for prompt in some]
            seed = np.random.SeedSequence((self.training.seed, step, DRAWS, start)).generate_state(1)[0]
            sampling = Sampling(max_tokens=max(rooms), temperature=1.0, seed=int(seed))
            for prompt, room, answer in zip(some, rooms, engine.complete(some, sampling), strict=True):
                # What stopped before the cap ended its text: that is learnt too.
                answer = [*answer, self.tokenizer.eos_token_id] if len(answer) < max(rooms) else answer
                answer = answer[:room]
                yield Document([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        self.model.train(training)


def prompts(rows: Rows, where: Where) -> Iterator[list[int]]:
    """What comes before the last answer of each document in some rows."""
    for row in where:
        starts = np.flatnonzero(rows.positions[row] == 0)
        for start, end in zip(starts, [*starts[1:], rows.ids.shape[1]], strict=True):
            learnt = rows.targets[row, start:end] != IGNORED
            if learnt.any():
                silent = np.flatnonzero(~learnt[: np.flatnonzero(learnt)[-1]])
                first = int(silent[-1]) + 1 if len(silent) else 0
                yield rows.ids[row, start : start + first + 1].tolist()
