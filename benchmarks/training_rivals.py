"""What the trainer is measured against: a loop as one writes it by hand, and Hugging Face's `Trainer`."""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lfm.tuning.base import Tune
from operators.artifact import Model
from operators.data.batches import IGNORED, Rows, global_batch
from operators.learning.learner import Place, adamw
from operators.training import Training
from operators.tuning import learner


class Clock:
    """When each step was done, and its loss; what the loop reports to."""

    now = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.times: list[float] = []
        self.curve: list[float] = []

    def progress(self, done: int, total: int, *, loss: float, **measures: float) -> None:
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


def bare(model: Model, rows: Rows, method: Tune, training: Training) -> Clock:
    """What one writes by hand."""
    clock = Clock()
    whole = learner(model.path, method, training, Place()).train()
    learnt = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    optimizer = adamw(learnt, training)
    steps = training.steps(len(rows))
    for step in range(steps):
        where = global_batch(len(rows), step, training.batch_size, training.seed)
        ids, positions, targets = (torch.from_numpy(x[where]).long() for x in (rows.ids, rows.positions, rows.targets))
        logits = whole(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt.values(), training.clip_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        clock.progress(step + 1, steps, loss=float(loss.detach()))
    return clock


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
