"""Batches -> trained weights: the one loop of every method that follows a gradient, with no Ray in it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lfm.errors import HyperparameterError, LfmError
from lfm.weights import Weights
from operators.data.batches import IGNORED, NoLossToken, Rows, global_batch, on_device, share
from operators.learning.learner import Learner, Place as Place, Replicas
from operators.sharing.notices import Preempted
from operators.sharing.pace import Pace
from operators.training import Training

STATE = "manifest.json"

Where = np.ndarray[Any, np.dtype[np.int64]]
"""Some rows, by their numbers."""


class Rested(LfmError, RuntimeError):
    """A training that stopped where it was asked to; what it had done is kept."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(done, total)
        self.done, self.total = done, total

    def __str__(self) -> str:
        return (
            f"it rests after {self.done} of {self.total} steps, as rest_at says, expected none of it to be finished. "
            "Run it without rest_at to go on."
        )


class NotKept(LfmError, RuntimeError):
    """A training that cannot go on where its settings change."""

    def __init__(self, wanted: int, found: int) -> None:
        super().__init__(wanted, found)
        self.wanted, self.found = wanted, found

    def __str__(self) -> str:
        return f"checkpoint: one of step {self.found}, expected one of step {self.wanted}. Try the step again."


class Diverged(LfmError, ArithmeticError):
    """A loss or a gradient that is no number any more."""

    def __init__(self, step: int, loss: float, norm: float) -> None:
        super().__init__(step, loss, norm)
        self.step, self.loss, self.norm = step, loss, norm

    def __str__(self) -> str:
        return (
            f"step {self.step}: loss {self.loss}, gradient norm {self.norm}, expected finite numbers. "
            "Lower learning_rate, or set clip_norm."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is trained.

    Attributes:
        objective: Called with a `Batch`, gives the sum of the loss over its loss tokens. Its parameters that require
            a gradient are trained; a frozen teacher is no submodule of it.
        rows: What it learns from.
        held_out: What it is looked at with.
        export: Writes the trained model into a folder, given the trained parameters by their names in `objective`.
        rewrite: Called with a step and the rows that it takes, gives what is learnt in their place: some rows, and
            which of them. The same on every rank.
        needs_frozen: Whether `export` writes parameters that are not trained too: it gets them where the objective
            does not hold them whole.
    """

    objective: nn.Module
    rows: Rows
    held_out: Rows | None
    export: Callable[[Mapping[str, Tensor], Path], None]
    rewrite: Callable[[int, Where], tuple[Rows, Where]] | None = None
    needs_frozen: bool = False


class Reporter(Protocol):
    """What the loop tells, and where it keeps checkpoints: part of a `Workspace`."""

    def progress(self, done: int, total: int, **measures: float) -> None:
        """See `Workspace`."""

    def keep(self, folder: Path) -> None:
        """See `Workspace`."""

    def kept(self) -> Path | None:
        """See `Workspace`."""

    def leaving(self) -> bool:
        """See `Workspace`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How it went.

    Attributes:
        weights: The trained parameters by name, whole, on the CPU; on the first worker only.
        steps: Steps of the optimizer, those before a resume too.
        loss_tokens: Tokens that were learnt, counted each time they were seen.
    """

    weights: Mapping[str, Tensor]
    steps: int
    loss_tokens: int


def train(job: Job, training: Training, place: Place, reporter: Reporter, scratch: Path, *, least: int = 0) -> Trained:
    """Follow the gradient of the mean loss over all loss tokens of each global batch.

    Args:
        job: What is trained.
        training: How; what changes midway, `stretches` knows.
        place: Where this process stands.
        reporter: Hears of it, and has its checkpoints.
        scratch: A folder to write these in.
        least: How far the kept checkpoint has to be.

    Raises:
        HyperparameterError: It is to look at held-out data, of which there are none.
        NoLossToken: A global batch has nothing to learn.
        Diverged: The loss is no number any more.
        Preempted: The machine of one of the processes is about to be taken away; there is a checkpoint.
        Rested: It is as far as it was to go; there is a checkpoint.
        NotKept: The checkpoint is of an earlier step than `least`.
    """
    if training.validate_every and job.held_out is None:
        raise HyperparameterError("training", "validate_every", training.validate_every, "0 without held-out data")
    steps = training.steps(len(job.rows))
    learner = _learner(job.objective, training, place)
    watch, pace = _Watch(training.patience), Pace(training.checkpoint_every)
    first, tokens_seen, measures = _resume(learner, watch, reporter)
    if first < least:
        raise NotKept(least, first)
    rest = steps if training.rest_at is None else training.rest_at
    if rest <= first < steps:
        if place.rank == 0:
            reporter.progress(first, steps, **measures)
        raise Rested(first, steps)
    job.objective.train()
    for step in range(first, steps):
        # Drawn anew at every step, so that a resumed run continues with the same dropout without carrying a state.
        torch.manual_seed(int(np.random.SeedSequence([training.seed, step, place.rank]).generate_state(1)[0]))
        loss, tokens = _accumulate(learner, job, step)
        norm = learner.step(training.rate(step, steps))
        # All agree on what one of them knows: that its machine goes; and on what the first one's clock says.
        told = [float(reporter.leaving()), float(place.rank == 0 and pace.due(step + 1))]
        total, leaving, due = learner.totals(torch.cat([loss[None], loss.new_tensor(told)]))
        mean = total / tokens
        if not (np.isfinite(mean) and (norm is None or np.isfinite(norm))):
            raise Diverged(step + 1, mean, norm if norm is not None else float("inf"))
        tokens_seen += tokens
        measures = {"loss": mean, "learning_rate": training.rate(step, steps)}
        if norm is not None:
            measures["gradient_norm"] = norm
        ended = False
        if job.held_out is not None and training.validate_every and (step + 1) % training.validate_every == 0:
            measures["held_out_loss"] = learner.mean_loss(job.held_out)
            ended = watch.enough(measures["held_out_loss"], learner)
        if place.rank == 0:
            reporter.progress(step + 1, steps, **measures)
        if ended:
            steps = step + 1
            break
        if (due or leaving or step + 1 == rest) and step + 1 < steps:
            with pace.kept():
                _keep(learner, watch, step + 1, tokens_seen, measures, reporter, scratch)
            if step + 1 == rest:
                raise Rested(step + 1, steps)
            if leaving:
                raise Preempted(step + 1, steps)
    weights = watch.best if watch.best_loss < float("inf") else learner.weights()
    if job.needs_frozen:
        weights = {**learner.frozen(), **weights}
    return Trained(weights=weights, steps=max(first, steps), loss_tokens=tokens_seen)


def _learner(objective: nn.Module, training: Training, place: Place) -> Learner:
    if place.strategy.startswith("zero"):
        from operators.learning.zero import Sharded

        return Sharded(objective, training, place)
    return Replicas(objective, training, place)


def _accumulate(learner: Learner, job: Job, step: int) -> tuple[Tensor, int]:
    """Add up this worker's part of a global batch's gradient.

    Returns:
        The sum of its loss, and how many loss tokens the batch has over all workers.
    """
    training, place = learner.training, learner.place
    rows, where = job.rows, global_batch(len(job.rows), step, training.batch_size, training.seed)
    if job.rewrite is not None:
        rows, where = job.rewrite(step, where)
    tokens = int((rows.targets[where] != IGNORED).sum())
    if not tokens:
        raise NoLossToken(f"batch of step {step + 1}", len(where))
    loss = torch.zeros((), device=place.device)
    micros = share(where, place.rank, place.world, training.micro_batch_size)
    for i, micro in enumerate(micros):
        loss += learner.learn(on_device(rows, micro, place.device), tokens, last=i == len(micros) - 1)
    return loss, tokens


class _Watch:
    """Remembers the best held-out loss, and its weights where training may end early."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best_loss, self.since, self.best = float("inf"), 0, dict[str, Tensor]()

    def enough(self, loss: float, learner: Learner) -> bool:
        """Take a loss in; whether there have been `patience` without a better one."""
        if self.patience is None:
            return False
        if loss < self.best_loss:
            self.best_loss, self.since, self.best = loss, 0, learner.weights()
        else:
            self.since += 1
        return self.since >= self.patience


def _keep(
    learner: Learner,
    watch: _Watch,
    step: int,
    tokens: int,
    measures: Mapping[str, float],
    reporter: Reporter,
    scratch: Path,
) -> None:
    """One format for every strategy: parameters and moments by name, so that any number of workers goes on from it."""
    weights, moments = learner.weights(), learner.moments()
    state = {
        "step": step,
        "loss_tokens": tokens,
        "measures": dict(measures),
        "best_loss": watch.best_loss,
        "since": watch.since,
        "optimizer": learner.state(),
    }
    if learner.place.rank:
        return
    folder = scratch / f"checkpoint-{step}"
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")
    save_file(moments, folder / "moments.safetensors")
    if watch.best:
        save_file(watch.best, folder / "best.safetensors")
    (folder / STATE).write_text(json.dumps(state))
    reporter.keep(folder)


def _resume(learner: Learner, watch: _Watch, reporter: Reporter) -> tuple[int, int, dict[str, float]]:
    """Go on from a checkpoint: its step, loss tokens until then, and what was measured there."""
    folder = reporter.kept()
    if folder is None:
        return 0, 0, {}
    state = json.loads((folder / STATE).read_text())
    learner.load(Weights(folder, "weights"), Weights(folder, "moments"), state["optimizer"])
    watch.best_loss, watch.since = state["best_loss"], state["since"]
    if not learner.place.rank and (folder / "best.safetensors").is_file():
        watch.best = load_file(folder / "best.safetensors")
    return int(state["step"]), int(state["loss_tokens"]), state["measures"]


def far(folder: Path | None) -> int:
    """After how many steps a checkpoint was kept; 0 where there is none."""
    return 0 if folder is None else int(json.loads((folder / STATE).read_text())["step"])
