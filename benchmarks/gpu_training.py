"""Parts of `gpu.py`: full and LoRA tuning, and distillation, against a loop by hand."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_models import Bench, NotRun, OtherWork, Size, close
from rounds import Figure, compared, interleaved
from torch import Tensor
from training_rivals import Clock, by_hand, cross_entropy_of

from lfm.distillation.forward_kl import ForwardKL
from lfm.tuning.base import Tune
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.data.batches import IGNORED, Rows
from operators.distillation import FromTeacher
from operators.learning.learner import Place
from operators.learning.loop import Job, train
from operators.models.language_models import DTYPES, load
from operators.models.objectives import NextToken
from operators.teaching.teachers import Teacher
from operators.training import Training
from operators.tuning import learner

OURS, BARE = "lfm", "bare PyTorch loop"
WARM = 3  # steps before the clock starts: memory is allocated and kernels are chosen in them
SAME = 0.02  # by which share losses in bfloat16 may differ
METHOD = ForwardKL(temperature=2.0)
LORA = LoRA(rank=16, alpha=32)


def drawn(number: int, length: int, vocabulary: int) -> Rows:
    """Rows of one document each, of random tokens."""
    ids = np.random.default_rng(0).integers(1, vocabulary, (number, length), dtype=np.int32)
    targets = np.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    return Rows(ids, np.tile(np.arange(length, dtype=np.int32), (number, 1)), targets)


def training_of(bench: Bench, batch_size: int) -> Training:
    """A short training."""
    return Training(
        max_steps=bench.either(12, WARM + 2), batch_size=bench.either(batch_size, 2), length=bench.either(1024, 16),
        learning_rate=1e-5, warmup=0.0, weight_decay=0.1, precision="bfloat16",
    )  # fmt: skip


def tuning(place: Place, *, folder: Path, method: Tune, training: Training, rows: Rows) -> Job:
    """What `tune` trains."""
    whole = learner(folder, method, training, place)
    return Job(objective=NextToken(whole, packed=training.packing), rows=rows, held_out=None, export=_nothing)


def distilling(place: Place, *, folder: Path, teacher: Path, training: Training, rows: Rows) -> Job:
    """What `distill` trains."""
    model = learner(folder, Full(), training, place)
    speaker = load(teacher, DTYPES[training.precision]).to(place.device)
    says = Teacher(speaker, temperature=METHOD.temperature, packed=training.packing)
    objective = FromTeacher(model, says, METHOD, hard_weight=0.0, packed=training.packing)
    return Job(objective=objective, rows=rows, held_out=None, export=_nothing)


def _nothing(weights: Mapping[str, Tensor], folder: Path) -> None:
    """What is trained here is thrown away."""


def ours(make: Callable[..., Job], bench: Bench, **given: Any) -> Clock:
    """The loop of every verb that trains, from its first step to its last."""
    clock, place = Clock(), Place(device=bench.device)
    train(make(place, **given), given["training"], place, clock, bench.home)
    return clock


def tuned_by_hand(bench: Bench, *, folder: Path, method: Tune, training: Training, rows: Rows) -> Clock:
    """The same with all logits at once."""
    whole = learner(folder, method, training, Place())
    return by_hand(whole, cross_entropy_of(whole), rows, training, device=bench.device, warm=WARM)


def distilled_by_hand(bench: Bench, *, folder: Path, teacher: Path, training: Training, rows: Rows) -> Clock:
    """The same with all logits of both models at once."""
    whole = learner(folder, Full(), training, Place())
    speaker = load(teacher, DTYPES[training.precision]).to(bench.device).eval()

    def loss(ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        learnt = targets != IGNORED
        with torch.no_grad():
            theirs = speaker(**given).logits[learnt].float().div(METHOD.temperature).log_softmax(dim=-1)
        mine = whole(**given).logits[learnt].float().div(METHOD.temperature).log_softmax(dim=-1)
        distance = torch.nn.functional.kl_div(mine, theirs, reduction="sum", log_target=True)
        return METHOD.temperature**2 * distance / len(mine)

    return by_hand(whole, loss, rows, training, device=bench.device, warm=WARM)


def full(name: str, bench: Bench) -> Iterator[Figure | str]:
    """Full tuning of a model."""
    size, training = bench.sizes[name], training_of(bench, 8)
    given = {"folder": bench.folder(size), "method": Full(), "training": training, "rows": _rows(size, training)}
    yield from measured(
        bench, f"full tuning, {name}", given, tuning, tuned_by_hand, operations=size.trained(training.length)
    )


def lora(name: str, bench: Bench) -> Iterator[Figure | str]:
    """LoRA tuning of a model."""
    size, training = bench.sizes[name], training_of(bench, 8)
    given = {"folder": bench.folder(size), "method": LORA, "training": training, "rows": _rows(size, training)}
    added = LORA.rank * size.layers * _sides(size)
    yield from measured(
        bench, f"LoRA tuning, {name}", given, tuning, tuned_by_hand, operations=size.adapted(training.length, added)
    )


def distillation(name: str, bench: Bench) -> Iterator[Figure | str]:
    """Distillation into a model from the larger one."""
    size, larger, training = bench.sizes[name], bench.sizes["1.5b"], training_of(bench, 4)
    given = {
        "folder": bench.folder(size), "teacher": bench.folder(larger, seed=1), "training": training,
        "rows": _rows(size, training),
    }  # fmt: skip
    operations = size.trained(training.length) + larger.forward(training.length)
    label = f"distillation into {name} from {larger.name}"
    yield from measured(bench, label, given, distilling, distilled_by_hand, operations=operations)


def measured(
    bench: Bench,
    label: str,
    given: Mapping[str, Any],
    make: Callable[..., Job],
    other: Callable[..., Clock],
    *,
    operations: int,
) -> Iterator[Figure | str]:
    """Tokens a second, what of the device's arithmetic that uses, and memory."""
    training: Training = given["training"]
    runs = {OURS: partial(ours, make, bench, **given), BARE: partial(other, bench, **given)}
    curves: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {n: [] for n in runs}

    def rate(rival: str, number: int) -> float:
        bench.clear()
        clock = runs[rival]()
        peak = bench.peak_gib()
        memory[rival] += [] if peak is None else [peak]
        curves[rival] = clock.curve
        return training.batch_size * training.length / clock.after(WARM)

    values = interleaved({n: partial(rate, n) for n in runs}, bench.rounds, until=bench.until)
    if not close(curves[OURS], curves[BARE], SAME):
        raise OtherWork(f"{label}: losses differ: {curves}")
    yield compared(values, OURS, BARE, unit="tokens/s", label=label, aim=">= 0.97")
    promise, most = bench.promised()
    for rival, rates in values.items():
        achieved = {rival: [r * operations / 1e12 for r in rates], promise: [most / 1e12] * len(rates)}
        yield compared(achieved, rival, promise, unit="TFLOP/s", label=f"{label}: MFU of {rival}")
    if not memory[OURS]:
        yield f"{label}: peak memory: not run: only a GPU counts it"
        return
    yield compared(memory, OURS, BARE, unit="GiB", label=f"{label}: peak memory")
    try:
        estimate = foreseen(make, given) / (1 << 30)
    except NotRun as reason:
        yield f"{label}: peak memory against the plan's estimate: not run: {reason}"
        return
    beside = {OURS: memory[OURS], "the plan's estimate": [estimate] * len(memory[OURS])}
    yield compared(beside, OURS, "the plan's estimate", unit="GiB", label=f"{label}: peak memory", aim="0.9 to 1.1")


def foreseen(make: Callable[..., Job], given: Mapping[str, Any]) -> float:
    """Bytes that the plan expects a worker to take on its GPU. The one place where its estimate comes in."""
    if find_spec("operators.learning.memory") is None:
        raise NotRun("the plan has no estimate of memory yet")
    raise NotRun("not asked for yet")


def _rows(size: Size, training: Training) -> Rows:
    return drawn(training.batch_size * 2, training.length, size.vocabulary)


def _sides(size: Size) -> int:
    """Inputs and outputs of a layer's matrices, which LoRA's have one of each."""
    kv_width = size.width // size.heads * size.kv_heads
    return 2 * (2 * size.width) + 2 * (size.width + kv_width) + 3 * (size.width + size.inner)
