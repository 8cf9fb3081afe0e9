"""What a worker holds while it trains, under each strategy: arithmetic on what a rehearsal has counted.

Sizes of a library's own buffers are its defaults, which this project leaves as they are.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lfm.chunks import chunk_size
from operators.footprint import Footprint
from operators.learning.rehearsal import Make, Rehearsal, foreseen
from operators.models.language_models import DTYPES, config_of, number_of_layers, size_of_head, sketch
from operators.models.objectives import NextToken
from operators.resources import Resources
from operators.training import Training

WORD = 4
"""Bytes of a weight that learns, of its gradient and of each moment: float32 always."""
REDUCED, GATHERED = 500_000_000, 1_000_000_000
"""DeepSpeed's values in flight: gradients of a bucket, and in stage 3 weights that are whole at once."""


def micro_batch(training: Training, workers: int) -> tuple[int, int]:
    """Rows that a worker holds at once, and how often it does for one step of the optimizer."""
    share = -(-training.batch_size // workers)
    rows = min(training.micro_batch_size or share, share)
    return rows, -(-share // rows)


def footprint(found: Rehearsal, training: Training, resources: Resources, *, teacher: int = 0) -> Footprint:
    """What each worker holds, and what all compute.

    Args:
        found: One micro-batch.
        training: How it trains.
        resources: On how many workers, and how these share it.
        teacher: Bytes of the weights of whoever is asked.
    """
    _, times = micro_batch(training, resources.least)
    learnt = int(found.learnt) * WORD
    # While the first micro-batch of a step runs backward, gradients take the place that activations leave.
    grown = int(found.besides if times > 1 else max(found.peak - learnt, 0))
    kept, moved = _shared(found, resources, learnt), _moved(found, resources, learnt)
    on_host = resources.offload == "cpu" and resources.device != "cpu"
    away = kept.moments + (kept.parameters if on_host and resources.strategy == "zero3" else 0)
    every = training.checkpoint_every
    return Footprint(
        parameters=kept.parameters if not (on_host and resources.strategy == "zero3") else 0,
        gradients=kept.gradients,
        moments=0 if on_host else kept.moments,
        activations=grown if resources.strategy in ("single", "ddp") else int(found.besides),
        teacher=teacher,
        buckets=moved,
        offloaded=away if on_host else 0,
        checkpoint=0 if every == 0 else 3 * learnt,
        device=resources.device,
        flops=found.flops * times * resources.least * (training.max_steps or 0),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    parameters: int
    gradients: int
    moments: int


def _shared(found: Rehearsal, resources: Resources, learnt: int) -> _Kept:
    """What a strategy leaves each worker of weights, gradients and moments."""
    workers, strategy = resources.least, resources.strategy
    if strategy in ("single", "ddp"):
        return _Kept(parameters=int(found.bytes), gradients=learnt, moments=2 * learnt)
    part = -(-learnt // workers)
    whole = int(found.bytes)
    return _Kept(
        parameters=-(-whole // workers) if strategy == "zero3" else whole,
        gradients=learnt if strategy == "zero1" else part,
        moments=3 * part,
    )


def _moved(found: Rehearsal, resources: Resources, learnt: int) -> int:
    """What is on its way between workers."""
    if resources.strategy == "single":
        return 0
    if resources.strategy == "ddp":
        return learnt
    bucket = REDUCED * WORD if resources.gpus else min(REDUCED * WORD, learnt)
    return bucket + (min(GATHERED * WORD, int(found.bytes)) if resources.strategy == "zero3" else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Practice:
    """A micro-batch to be rehearsed; two with the same fields but `make` are one, and rehearsed once.

    Attributes:
        make: Called with the number of layers of each model, or None for all of them, gives what is trained and whom
            that asks.
        configs: Of these models, that which learns first.
        what: What else decides what `make` makes.
        rows: Of the micro-batch.
        length: Tokens of a row.
        targets: How many of all tokens have a loss.
        precision: Of the forward pass.
        device: Where it will run.
        deep: Whether all layers have to be there, because some of them are named.
    """

    make: Make = field(compare=False)
    configs: tuple[str, ...]
    what: str
    rows: int
    length: int
    targets: int
    precision: str
    device: str
    deep: bool = False


@lru_cache(maxsize=64)
def counted(practice: Practice) -> Rehearsal:
    """What it holds and computes."""
    configs = [json.loads(said) for said in practice.configs]
    size = size_of_head(configs[0])
    return foreseen(
        practice.make,
        [None if practice.deep else number_of_layers(config) for config in configs],
        rows=practice.rows,
        length=practice.length,
        targets=practice.targets,
        chunk=chunk_size(size, torch.device(practice.device)) if size else practice.targets,
        precision=practice.precision,
        device=practice.device,
        heap=practice.device == "cpu",
    )


def trained(
    make: Make,
    configs: Sequence[Mapping[str, Any]],
    training: Training,
    resources: Resources,
    *,
    what: str = "",
    labelled: bool = False,
    teacher: int = 0,
    deep: bool = False,
) -> Footprint:
    """What training takes of what `make` puts together.

    Args:
        make: As in `Practice`, and so are `configs`, `what` and `deep`.
        configs: Of the models.
        training: How.
        resources: Where.
        what: What else decides what is made.
        labelled: Whether a row has one loss token, its label, instead of one for each of its tokens.
        teacher: Bytes of the weights of who is asked.
        deep: Whether all layers have to be there.
    """
    rows, _ = micro_batch(training, resources.least)
    practice = Practice(
        make=make,
        configs=tuple(json.dumps(config, sort_keys=True, default=str) for config in configs),
        what=f"{what} {training.gradient_checkpointing} {training.packing} {labelled}",
        rows=rows,
        length=training.length,
        targets=rows if labelled else rows * training.length,
        precision=training.precision,
        device=resources.device,
        deep=deep,
    )
    found = counted(practice)
    if training.max_steps == 0:
        return Footprint(parameters=int(found.bytes))
    return footprint(found, training, resources, teacher=teacher)


def answering(folder: Path, *, rows: int, length: int, precision: str, gpus: float) -> Footprint:
    """What it takes to have a language model answer rows of tokens: its weights, and what a forward pass holds.

    Args:
        folder: The model's.
        rows: That it reads at once.
        length: Tokens of a row.
        precision: Of its weights, in which it computes.
        gpus: Of all workers.
    """

    def make(layers: int | None) -> Sequence[nn.Module]:
        model = sketch(folder, DTYPES[precision], layers=layers)
        return (NextToken(model.requires_grad_(False), packed=False),)

    device = "cuda" if gpus else "cpu"
    practice = Practice(
        make=make,
        configs=(json.dumps(config_of(folder), sort_keys=True),),
        what=f"answers in {precision}",
        rows=rows,
        length=length,
        targets=rows * length,
        precision="float32",
        device=device,
    )
    found = counted(practice)
    return Footprint(parameters=int(found.bytes), activations=int(found.besides), device=device)
