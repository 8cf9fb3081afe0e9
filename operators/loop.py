"""Batches -> trained weights: the one loop of every method that follows a gradient, with no Ray in it."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lfm.errors import LfmError
from operators.batches import IGNORED, Batch, NoLossToken, Rows, global_batch, on_device, share
from operators.training import Training

STATE = "manifest.json"


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
class Place:
    """Where one of the processes that train together stands."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strategy: str = "single"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is trained.

    Attributes:
        objective: Called with a `Batch`, gives the sum of the loss over its loss tokens. Its parameters that require
            a gradient are trained; a frozen teacher is no submodule of it.
        rows: What it learns from.
        held_out: What it is looked at with.
        export: Writes the trained model into a folder, given the trained parameters by their names in `objective`.
    """

    objective: nn.Module
    rows: Rows
    held_out: Rows | None
    export: Callable[[Mapping[str, Tensor], Path], None]


class Reporter(Protocol):
    """What the loop tells, and where it keeps checkpoints: part of a `Workspace`."""

    def progress(self, done: int, total: int, **measures: float) -> None:
        """See `Workspace`."""

    def keep(self, folder: Path) -> None:
        """See `Workspace`."""

    def kept(self) -> Path | None:
        """See `Workspace`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How it went.

    Attributes:
        weights: The trained parameters by name, whole, on the CPU.
        steps: Steps of the optimizer, those before a resume too.
        loss_tokens: Tokens that were learnt, counted each time they were seen.
    """

    weights: Mapping[str, Tensor]
    steps: int
    loss_tokens: int


def train(job: Job, training: Training, place: Place, reporter: Reporter, scratch: Path) -> Trained:
    """Follow the gradient of the mean loss over all loss tokens of each global batch.

    Raises:
        NoLossToken: A global batch has nothing to learn.
        Diverged: The loss is no number any more.
    """
    steps = training.steps(len(job.rows))
    engine = Engine(job.objective, training, place)
    watch = _Watch(training.patience)
    first, tokens_seen = _resume(engine, watch, reporter)
    job.objective.train()
    for step in range(first, steps):
        # Drawn anew at every step, so that a resumed run continues with the same dropout without carrying a state.
        torch.manual_seed(int(np.random.SeedSequence([training.seed, step, place.rank]).generate_state(1)[0]))
        where = global_batch(len(job.rows), step, training.batch_size, training.seed)
        tokens = int((job.rows.targets[where] != IGNORED).sum())
        if not tokens:
            raise NoLossToken(f"batch of step {step + 1}", len(where))
        loss = torch.zeros((), device=place.device)
        micros = share(where, place.rank, place.world, training.micro_batch_size)
        for i, micro in enumerate(micros):
            loss += engine.learn(on_device(job.rows, micro, place.device), tokens, last=i == len(micros) - 1)
        norm = engine.step(training.rate(step, steps))
        mean = engine.total(loss) / tokens
        if not (np.isfinite(mean) and np.isfinite(norm)):
            raise Diverged(step + 1, mean, norm)
        tokens_seen += tokens
        measures = {"loss": mean, "learning_rate": training.rate(step, steps), "gradient_norm": norm}
        ended = False
        if training.validate_every and job.held_out is not None and (step + 1) % training.validate_every == 0:
            measures["held_out_loss"] = engine.mean_loss(job.held_out, training)
            ended = watch.enough(measures["held_out_loss"], engine)
        if place.rank == 0:
            reporter.progress(step + 1, steps, **measures)
        if ended:
            steps = step + 1
            break
        if training.checkpoint_every and (step + 1) % training.checkpoint_every == 0 and step + 1 < steps:
            _keep(engine, watch, step + 1, tokens_seen, place, reporter, scratch)
    return Trained(weights=watch.best or engine.weights(), steps=max(first, steps), loss_tokens=tokens_seen)


class Engine:
    """Forward, backward and optimizer for one process, or for several that hold whole copies (``ddp``)."""

    def __init__(self, objective: nn.Module, training: Training, place: Place) -> None:
        self.place, self.training = place, training
        self.objective = objective.to(place.device)
        self.module: nn.Module = self.objective
        if place.strategy == "ddp":
            self.module = nn.parallel.DistributedDataParallel(self.objective)
        self.learnt = {n: p for n, p in self.objective.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.learnt.values() if p.ndim > 1], "weight_decay": training.weight_decay},
                {"params": [p for p in self.learnt.values() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.epsilon,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=training.precision == "float16")

    def learn(self, batch: Batch, tokens: int, *, last: bool) -> Tensor:
        """Add the gradient of one micro-batch, as its part of a batch of `tokens` loss tokens; returns its sum."""
        with self._alone_unless(last), self._precision():
            loss: Tensor = self.module(batch)
        with self._alone_unless(last):
            # DDP averages over the workers what has to be summed over them.
            self.scaler.scale(loss * (self.place.world / tokens)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self, rate: float) -> float:
        """Move the weights; returns the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        limit = self.training.clip_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.learnt.values(), limit))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def total(self, value: Tensor) -> float:
        """The sum of one number over all workers."""
        if self.place.world > 1:
            torch.distributed.all_reduce(value)
        return float(value)

    @torch.no_grad()
    def mean_loss(self, rows: Rows, training: Training) -> float:
        """The loss per loss token of rows that are not learnt."""
        self.objective.eval()
        loss = torch.zeros((), device=self.place.device, dtype=torch.float64)
        size = training.micro_batch_size or training.batch_size
        for start in range(0, len(rows), size * self.place.world):
            where = np.arange(start, min(len(rows), start + size * self.place.world))
            for micro in share(where, self.place.rank, self.place.world, None):
                with self._precision():
                    loss += self.objective(on_device(rows, micro, self.place.device)).double()
        self.objective.train()
        return self.total(loss) / rows.loss_tokens

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters, whole, on the CPU."""
        return {n: p.detach().cpu().clone() for n, p in self.learnt.items()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments by parameter and kind."""
        return {
            f"{name}.{kind}": self.optimizer.state[p][kind].detach().cpu().clone()
            for name, p in self.learnt.items()
            for kind in ("exp_avg", "exp_avg_sq")
        }

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int) -> None:
        """Go on from a checkpoint."""
        for name, p in self.learnt.items():
            p.copy_(weights[name])
            self.optimizer.state[p] = {
                "step": torch.tensor(float(steps), device=p.device),
                **{k: moments[f"{name}.{k}"].to(p.device, p.dtype) for k in ("exp_avg", "exp_avg_sq")},
            }

    def _precision(self) -> AbstractContextManager[Any]:
        if self.training.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.place.device.type, getattr(torch, self.training.precision))

    @contextlib.contextmanager
    def _alone_unless(self, last: bool) -> Iterator[None]:
        """Exchange gradients with the last micro-batch only."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
        else:
            yield


class _Watch:
    """Remembers the best held-out loss, and its weights where training may end early."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best_loss, self.since, self.best = float("inf"), 0, dict[str, Tensor]()

    def enough(self, loss: float, engine: Engine) -> bool:
        """Take a loss in; whether there have been `patience` without a better one."""
        if self.patience is None:
            return False
        if loss < self.best_loss:
            self.best_loss, self.since, self.best = loss, 0, engine.weights()
        else:
            self.since += 1
        return self.since >= self.patience


def _keep(
    engine: Engine, watch: _Watch, step: int, tokens: int, place: Place, reporter: Reporter, scratch: Path
) -> None:
    """One format for every strategy: parameters and moments by name, so that any number of workers goes on from it."""
    weights, moments = engine.weights(), engine.moments()
    if place.rank:
        return
    folder = scratch / f"checkpoint-{step}"
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")
    save_file(moments, folder / "moments.safetensors")
    if watch.best:
        save_file(watch.best, folder / "best.safetensors")
    state = {"step": step, "loss_tokens": tokens, "best_loss": watch.best_loss, "since": watch.since}
    (folder / STATE).write_text(json.dumps(state))
    reporter.keep(folder)


def _resume(engine: Engine, watch: _Watch, reporter: Reporter) -> tuple[int, int]:
    folder = reporter.kept()
    if folder is None:
        return 0, 0
    state = json.loads((folder / STATE).read_text())
    engine.load(load_file(folder / "weights.safetensors"), load_file(folder / "moments.safetensors"), state["step"])
    watch.best_loss, watch.since = state["best_loss"], state["since"]
    if (folder / "best.safetensors").is_file():
        watch.best = load_file(folder / "best.safetensors")
    return int(state["step"]), int(state["loss_tokens"])
