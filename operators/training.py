"""The settings that every step which follows a gradient shares."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from operators.base import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Change(Settings):
    """Other values in the middle of a training.

    Attributes:
        at: Steps of the optimizer after which they hold.
        values: By field; only such as are `adjustable`, the method's among them. None at all changes nothing.
    """

    at: int
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.require(self.at >= 1, "at", "at >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Training(Settings):
    """How a model is trained; none of it depends on how many workers do it.

    Nor does the result: only where a model or a method has dropout do its draws follow how a batch is split.

    Attributes:
        max_steps: Steps of the optimizer; None counts `epochs` instead, 0 trains nothing.
        epochs: Passes over the data where `max_steps` is None.
        batch_size: Rows of one step of the optimizer, over all workers.
        micro_batch_size: Rows that one worker holds at once; None takes its whole share, fewer accumulate.
        length: Tokens of a row.
        packing: Fill a row with several documents, which do not see each other.
        learning_rate: The highest it gets.
        schedule: How it falls after warming up: ``cosine``, ``linear`` or not at all.
        warmup: Share of the steps in which it rises from 0, in [0, 1).
        final_rate: Share of `learning_rate` that is left at the end, in [0, 1].
        weight_decay: AdamW's, on matrices; vectors (norms, biases) are left alone.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second.
        epsilon: AdamW's.
        clip_norm: The gradient's norm is cut to this; None leaves it.
        precision: Of the forward pass; parameters and optimizer are float32 always.
        gradient_checkpointing: Compute activations twice to hold fewer.
        seed: Decides the order of the data, dropout and what is drawn at the start.
        checkpoint_every: Steps between checkpoints; 0 keeps none, None one a minute as long as that takes less than a
            fiftieth of the time.
        validate_every: Steps between looks at the held-out data; 0 never looks.
        patience: Looks without a better loss after which it ends with the best weights; None never.
        midway: Values that change on the way, each from some step on, in order.
        rest_at: Steps after which it stops unfinished, and keeps a checkpoint from which the same step without it, or
            with changes from there on, goes on; None never. A search with a population has its trials rest.
    """

    noise = frozenset({"micro_batch_size", "gradient_checkpointing", "checkpoint_every", "rest_at"})
    adjustable = frozenset({"learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "clip_norm"})

    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    micro_batch_size: int | None = None
    length: int = 512
    packing: bool = True
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    final_rate: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    seed: int = 0
    checkpoint_every: int | None = None
    validate_every: int = 0
    patience: int | None = None
    midway: tuple[Change, ...] = ()
    rest_at: int | None = None

    def __post_init__(self) -> None:
        self.require(self.max_steps is None or self.max_steps >= 0, "max_steps", "max_steps >= 0")
        self.require(self.epochs > 0, "epochs", "epochs > 0")
        self.require(self.batch_size >= 1, "batch_size", "batch_size >= 1")
        self.require(
            self.micro_batch_size is None or 1 <= self.micro_batch_size <= self.batch_size,
            "micro_batch_size",
            "1 <= micro_batch_size <= batch_size",
        )
        self.require(self.length >= 2, "length", "length >= 2")
        self.require(self.learning_rate > 0, "learning_rate", "learning_rate > 0")
        self.require(0 <= self.warmup < 1, "warmup", "0 <= warmup < 1")
        self.require(0 <= self.final_rate <= 1, "final_rate", "0 <= final_rate <= 1")
        self.require(self.weight_decay >= 0, "weight_decay", "weight_decay >= 0")
        self.require(0 <= self.beta1 < 1, "beta1", "0 <= beta1 < 1")
        self.require(0 <= self.beta2 < 1, "beta2", "0 <= beta2 < 1")
        self.require(self.epsilon > 0, "epsilon", "epsilon > 0")
        self.require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "clip_norm > 0, or none")
        self.require(self.seed >= 0, "seed", "seed >= 0")
        self.require(
            self.checkpoint_every is None or self.checkpoint_every >= 0,
            "checkpoint_every",
            "checkpoint_every >= 0, or none",
        )
        self.require(self.validate_every >= 0, "validate_every", "validate_every >= 0")
        self.require(self.patience is None or self.patience >= 1, "patience", "patience >= 1, or none")
        self.require(
            self.patience is None or self.validate_every > 0, "patience", "none, or validate_every > 0 beside it"
        )
        places = [change.at for change in self.midway]
        self.require(places == sorted({*places}), "midway", "each change after the one before it")
        self.require(self.rest_at is None or self.rest_at >= 1, "rest_at", "rest_at >= 1, or none")

    def steps(self, rows: int) -> int:
        """Steps of the optimizer for so many rows; an epoch's last batch is filled from the next epoch."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * rows / self.batch_size))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = round(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        done = (step - rising) / max(1, steps - rising)
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * left)
