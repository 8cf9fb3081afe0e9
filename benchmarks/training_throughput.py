"""Tokens per second of the trainer against a bare torch loop and Hugging Face's `Trainer`, on the same rows.

All start from the same weights, take the same batches and have the same optimizer. It is the same work: where their
loss curves differ, this ends with an error.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from rounds import Figure, command_line, compared, interleaved, said
from training_rivals import Clock, bare, trainer

from lfm.tuning.base import Tune
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.artifact import Dataset, Model
from operators.data.rows import read_rows
from operators.learning.learner import Place
from operators.learning.loop import train
from operators.pretraining import Architecture, new_model, train_tokenizer
from operators.training import Training
from operators.tuning import _job

TOLERANCE = 1e-3
OURS, BARE, TRAINER = "lfm", "bare torch loop", "Hugging Face Trainer"


def ours(model: Model, data: Dataset, method: Tune, training: Training) -> Clock:
    """The verb `tune` from its first step to its last."""
    clock = Clock()
    job = _job(Place(), model=model, data=data, held_out=None, method=method, training=training)
    train(job, training, Place(), clock, Path())
    return clock


def measured(
    name: str, method: Tune, asked: argparse.Namespace, model: Model, data: Dataset, home: Path
) -> list[Figure]:
    """Rounds of short trainings, in which each step's time is looked at."""
    training = Training(
        max_steps=asked.steps, batch_size=asked.batch_size, length=asked.length, learning_rate=1e-3, warmup=0.0,
        weight_decay=0.1,
    )  # fmt: skip
    rows = _job(Place(), model=model, data=data, held_out=None, method=method, training=training).rows
    runs: dict[str, Callable[[], Clock]] = {
        BARE: partial(bare, model, rows, method, training),
        OURS: partial(ours, model, data, method, training),
    }
    if find_spec("accelerate") is None:
        print(f"{TRAINER}: skipped, accelerate is not installed")
    else:
        runs[TRAINER] = partial(trainer, model, rows, method, training, home / "trainer")
    curves: dict[str, list[float]] = {}

    def rate(rival: str, number: int) -> float:
        clock = runs[rival]()
        curves[rival] = clock.curve
        return asked.batch_size * asked.length / clock.seconds

    values = interleaved({n: partial(rate, n) for n in runs}, asked.rounds)
    gaps = {n: max(abs(a - b) for a, b in zip(curves[n], curves[BARE], strict=True)) for n in curves}
    print(f"{name}: largest difference of a loss to the bare loop's: {gaps}")
    if max(gaps.values()) > TOLERANCE:
        raise SystemExit(f"{name}: these are not the same work, their loss curves differ: {curves}")
    return [
        compared(values, n, BARE, unit="tokens/s", label=f"{n}, {name} tuning", aim=">= 0.97" if n == OURS else "")
        for n in runs
        if n != BARE
    ]


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=5)
    parser.add_argument("--steps", type=int, default=8, help="of the optimizer in each training")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that torch computes with")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the process's CPU seconds: for a busy machine, with --threads 1"
    )
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.cpu_time:
        Clock.now = staticmethod(time.process_time)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        texts = read_rows(Dataset("python://text"))["text"].to_pylist()[::10]
        (home / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        tokenizer = train_tokenizer(texts, asked.vocabulary)
        tokenizer.save_pretrained(home / "model")
        sizes = {"layers": asked.layers, "width": asked.width, "heads": asked.heads, "context": asked.length}
        torch.manual_seed(0)
        new_model(Architecture(vocabulary=asked.vocabulary, **sizes), tokenizer).save_pretrained(home / "model")
        model, data = Model(str(home / "model"), "d" * 64), Dataset(str(home / "text.jsonl"))
        methods: dict[str, Tune] = {"full": Full(), "lora": LoRA(rank=16, alpha=32)}
        figures = [f for n in asked.methods for f in measured(n, methods[n], asked, model, data, home)]
    said(figures, asked)


if __name__ == "__main__":
    main()
