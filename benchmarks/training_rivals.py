"""What the trainer is measured against: a loop as one writes it by hand, and Hugging Face's `Trainer`."""

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from lfm.tuning.base import Tune
from operators.artifact import Model
from operators.data.batches import IGNORED, Rows, global_batch
from operators.learning.learner import Place, adamw
from operators.training import Training
from operators.tuning import learner

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The mean loss of some rows, from their tokens, positions and targets."""

CPU = torch.device("cpu")


class Clock:
    """When each step was done, and its loss; what the loop reports to."""

    now = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.times: list[float] = []
        self.curve: list[Any] = []

    def progress(self, done: int, total: int, *, loss: Any, **measures: float) -> None:
        """A step is done."""
        self.times.append(self.now())
        self.curve.append(loss)

    def keep(self, folder: Path) -> None:
        """Never called: there are no checkpoints."""

    def kept(self) -> Path | None:
        """Nothing to go on from."""

    def leaving(self) -> bool:
        """Never."""
        return False

    @property
    def seconds(self) -> float:
        """The median step but for the first, which allocates."""
        return statistics.median(np.diff(self.times))

    def after(self, warm: int) -> float:
        """Seconds of a step: the mean of those after the first `warm`, at whose end and last the device was done."""
        return (self.times[-1] - self.times[warm - 1]) / (len(self.times) - warm)


def bare(model: Model, rows: Rows, method: Tune, training: Training) -> Clock:
    """What one writes by hand."""
    whole = learner(model.path, method, training, Place())
    return by_hand(whole, cross_entropy_of(whole), rows, training)


def cross_entropy_of(whole: Any) -> Loss:
    """The loss of the next token, by hand: of all logits at once."""

    def loss(ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        logits = whole(input_ids=ids, position_ids=positions, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    return loss


def by_hand(
    whole: Any, loss_of: Loss, rows: Rows, training: Training, *, device: torch.device = CPU, warm: int = 1
) -> Clock:
    """A loop as one writes it, which waits for the device only after `warm` steps and at the end."""
    clock = Clock()
    whole.to(device).train()
    learnt = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    optimizer = adamw(learnt, training)
    steps = training.steps(len(rows))
    for step in range(steps):
        where = global_batch(len(rows), step, training.batch_size, training.seed)
        given = (torch.from_numpy(x[where]).long().to(device) for x in (rows.ids, rows.positions, rows.targets))
        with autocast(training, device):
            loss = loss_of(*given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt.values(), training.clip_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in (warm, steps):
            waited(device)
        clock.progress(step + 1, steps, loss=loss.detach())
    clock.curve = [float(loss) for loss in clock.curve]
    return clock


def autocast(training: Training, device: torch.device) -> Any:
    """What a forward pass runs in."""
    if training.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, training.precision))


def waited(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trainer(model: Model, rows: Rows, method: Tune, training: Training, folder: Path) -> Clock:
    """Hugging Face's `Trainer`, which shifts labels itself."""
    clock = Clock()

    class Times(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "loss" in logs:
                clock.progress(state.global_step, state.max_steps, loss=logs["loss"])

    steps = training.steps(len(rows))
    order = np.concatenate([global_batch(len(rows), s, training.batch_size, training.seed) for s in range(steps)])
    labels = np.full_like(rows.targets, IGNORED)
    labels[:, 1:] = rows.targets[:, :-1]
    columns = {"input_ids": rows.ids, "position_ids": rows.positions, "labels": labels}
    examples = [{k: torch.from_numpy(v[i]).long() for k, v in columns.items()} for i in order]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip_norm,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    whole = learner(model.path, method, training, Place())
    run = transformers.Trainer(whole, arguments, train_dataset=examples, callbacks=[Times()])
    run.remove_callback(transformers.PrinterCallback)
    run.train()
    return clock
