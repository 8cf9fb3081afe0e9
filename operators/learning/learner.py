"""Forward, backward and optimizer of the processes that train together."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lfm.networks import statistics_of
from lfm.weights import Weights
from operators.data.batches import Batch, Rows, on_device, share
from operators.training import Training

KINDS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, by torch's names for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one of the processes that train together stands.

    Attributes:
        rank: Its number.
        world: How many there are.
        device: What it computes on.
        strategy: How they share the work, as `Resources` has it.
        offload: Where ZeRO keeps what does not compute.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strategy: str = "single"
    offload: str = "none"


class Learner(ABC):
    """What the loop asks of a strategy; every process calls the same methods in the same order.

    Attributes:
        learnt: The parameters that require a gradient, by their names in the objective.
        seen: What its batch normalisations have seen, by name too: a part of what is trained, without a gradient.
    """

    def __init__(self, objective: nn.Module, training: Training, place: Place) -> None:
        self.objective, self.training, self.place = objective, training, place
        self.learnt = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.seen = statistics_of(objective)

    @abstractmethod
    def learn(self, batch: Batch, tokens: int, *, last: bool) -> Tensor:
        """Add the gradient of one micro-batch, as its part of a batch of `tokens` loss tokens; returns its sum."""

    @abstractmethod
    def step(self, rate: float) -> float | None:
        """Move the weights.

        Returns:
            The gradient's norm before clipping, or None where it overflowed in float16 and the weights stayed.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """`learnt` and `seen`, whole, on the CPU of the first worker; nothing on others."""

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments by parameter and kind, whole, on the CPU of the first worker; nothing on others."""

    @abstractmethod
    def state(self) -> dict[str, float]:
        """What else of the optimizer goes into a checkpoint."""

    @abstractmethod
    def load(self, weights: Weights, moments: Weights, state: Mapping[str, float]) -> None:
        """Go on from what `weights`, `moments` and `state` gave."""

    def frozen(self) -> dict[str, Tensor]:
        """The parameters that do not learn, like `weights`, where they are not whole in the objective."""
        return {}

    def totals(self, values: Tensor) -> list[float]:
        """The sum of each number over all workers."""
        if self.place.world > 1:
            torch.distributed.all_reduce(values)
        found: list[float] = values.tolist()
        return found

    @torch.no_grad()
    def mean_loss(self, rows: Rows) -> float:
        """The loss per loss token of rows that are not learnt."""
        self.objective.eval()
        world = self.place.world
        loss = torch.zeros((), device=self.place.device, dtype=torch.float64)
        size = self.training.micro_batch_size or -(-self.training.batch_size // world)
        for start in range(0, len(rows), size * world):
            where = np.arange(start, min(len(rows), start + size * world))
            (micro,) = share(where, self.place.rank, world, None)
            with self.precision():
                loss += self.objective(on_device(rows, micro, self.place.device)).double()
        self.objective.train()
        return self.totals(loss[None])[0] / rows.loss_tokens

    def precision(self) -> AbstractContextManager[Any]:
        """What a forward pass runs in."""
        if self.training.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.place.device.type, getattr(torch, self.training.precision))


def adamw(learnt: Mapping[str, nn.Parameter], training: Training) -> torch.optim.AdamW:
    """The optimizer of every strategy; vectors (norms, biases) do not decay."""
    matrices = [p for p in learnt.values() if p.ndim > 1]
    vectors = [p for p in learnt.values() if p.ndim < 2]
    groups = [(matrices, training.weight_decay), (vectors, 0.0)]
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for params, decay in groups if params],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        fused=True,
    )


class Replicas(Learner):
    """One process, or several that hold whole copies (``ddp``)."""

    def __init__(self, objective: nn.Module, training: Training, place: Place) -> None:
        super().__init__(objective.to(place.device), training, place)
        self.module: nn.Module = self.objective
        if place.strategy == "ddp":
            self.module = nn.parallel.DistributedDataParallel(self.objective)
        self.optimizer = adamw(self.learnt, training)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=training.precision == "float16")
        self.updates = 0

    @override
    def learn(self, batch: Batch, tokens: int, *, last: bool) -> Tensor:
        with self._alone_unless(last):
            with self.precision():
                loss: Tensor = self.module(batch)
            # DDP averages over the workers what has to be summed over them.
            self.scaler.scale(loss * (self.place.world / tokens)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @override
    def step(self, rate: float) -> float | None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        limit = self.training.clip_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.learnt.values(), limit))
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if 1 <= self.scaler.get_scale() < scale:  # below 1 it is no overflow of float16 any more
            return None
        self.updates += 1
        return norm

    @override
    def weights(self) -> dict[str, Tensor]:
        held = {} if self.place.rank else {**self.learnt, **self.seen}
        return {n: p.detach().cpu().clone() for n, p in held.items()}

    @override
    def moments(self) -> dict[str, Tensor]:
        held = {} if self.place.rank else self.optimizer.state
        return {f"{n}.{k}": held[p][k].cpu().clone() for n, p in self.learnt.items() if p in held for k in KINDS}

    @override
    def state(self) -> dict[str, float]:
        scaler = self.scaler.state_dict()  # empty unless float16
        return {"updates": self.updates, **{k: scaler[k] for k in ("scale", "_growth_tracker") if k in scaler}}

    @override
    @torch.no_grad()
    def load(self, weights: Weights, moments: Weights, state: Mapping[str, float]) -> None:
        self.updates = int(state["updates"])
        for name, value in self.seen.items():
            value.copy_(weights.read(name))
        for name, p in self.learnt.items():
            p.copy_(weights.read(name))
            if f"{name}.{KINDS[0]}" in moments.headers:  # one that never had a gradient has none
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.updates), device=p.device),
                    **{k: moments.read(f"{name}.{k}").to(p.device) for k in KINDS},
                }
        if "scale" in state:
            self.scaler.load_state_dict({**self.scaler.state_dict(), **state})

    @contextlib.contextmanager
    def _alone_unless(self, last: bool) -> Iterator[None]:
        """Exchange gradients with the last micro-batch only."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
        else:
            yield
