"""Rows -> sums: parts of the rows are observed anywhere, each in its order, and added up in theirs.

How many parts there are does not depend on who observes them, so that any number of workers gives the same bytes.
"""

import json
import os
import pickle
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lfm.errors import LfmError
from lfm.statistics import Observer, Statistic
from operators.artifact import Adapter, Model
from operators.data.batches import IGNORED, Rows, on_device
from operators.measures.outcomes import ASKED, read
from operators.models.changed_models import opened
from operators.models.language_models import architecture_of
from operators.resources import Resources
from operators.sharing.notices import FolderNotShared, Preempted, lost_with, nodes
from operators.sharing.pace import Pace
from operators.workspace import Workspace

PARTS = 32  # of the rows: so many workers at most, and so often the step says how far it is
IDS, TARGETS = "ids.npy", "targets.npy"
SUMS, STATE = "sums.safetensors", "manifest.json"

Sums = dict[str, Tensor]
"""Tensors by name, float32."""


class NotFinite(LfmError, ArithmeticError):
    """Something measured that is no number."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"measured {self.name!r}: infinite or not a number, expected finite sums. Look for it in the model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What is observed: plain data, with paths that every worker can read.

    Attributes:
        model: Who reads the rows.
        base: What `model` was trained on, where it is an adapter.
        statistics: What is observed of it.
        home: A folder of the step's own, with the rows in it.
        rows: How many there are.
        batch_size: Rows at once, where no kind goes row by row.
        device: What computes.
    """

    model: Model | Adapter
    base: Model | None
    statistics: tuple[Statistic, ...]
    home: Path
    rows: int
    batch_size: int
    device: str

    @property
    def parts(self) -> int:
        """How many parts the rows are cut into."""
        return min(PARTS, self.rows)


def lay_down(rows: Rows, home: Path) -> int:
    """Write rows of one document each where every worker reads its own.

    Returns:
        How many of their tokens count.
    """
    np.save(home / IDS, rows.ids)
    np.save(home / TARGETS, rows.targets)
    asked = rows.targets != IGNORED
    return int((asked.shape[1] - asked[:, ::-1].argmax(axis=1))[asked.any(axis=1)].sum())


def observed(work: Workspace, job: Pass) -> Sums:
    """The sums over all rows; what an earlier attempt had of them is gone on with.

    Raises:
        Preempted: The machine is about to be taken away; what there is so far is kept.
        NodeLost: A worker was lost with its machine.
        NotFinite: A sum is no number.
    """
    total, first = _resume(work)
    pace = Pace()
    with closing(_parts(work.resources, job, first)) as parts:
        for part, found in parts:
            total = found if not total else {name: value.add_(found[name]) for name, value in total.items()}
            done = part + 1
            work.progress(sum(map(len, _cut(job)[:done])), job.rows)
            leaving = work.leaving()
            if (leaving or pace.due(done)) and done < job.parts:
                with pace.kept():
                    _keep(work, total, done)
                if leaving:
                    raise Preempted(done, job.parts)
    for name, value in total.items():
        if not value.isfinite().all():
            raise NotFinite(name)
    return total


def sums(job: Pass, parts: Iterable[int]) -> Generator[tuple[int, Sums], None, None]:
    """Observe parts one after the other."""
    device = torch.device(job.device)
    whole, home = opened("measure", job.model, job.base)
    model = (whole if isinstance(job.model, Model) else whole.merge_and_unload()).to(device).eval()
    model.requires_grad_(True)  # what PEFT adds freezes the rest
    ids, targets = (np.load(job.home / name, mmap_mode="r") for name in (IDS, TARGETS))
    rows = Rows(ids, np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape), targets)
    ask = ASKED[architecture_of(home)]
    observer = Observer(model, job.statistics)
    size = 1 if observer.row_by_row else job.batch_size
    for part in parts:
        total: Sums = {}
        numbers = _cut(job)[part]
        for start in range(0, len(numbers), size):
            batch = on_device(rows, numbers[start : start + size], device)
            found = observer(batch.where.tolist(), read(batch), partial(ask, model, batch))
            for name, value in found.items():
                total[name] = total[name].add_(value) if name in total else value.clone()
        yield part, {name: value.cpu().contiguous() for name, value in total.items()}


def _cut(job: Pass) -> "list[np.ndarray[Any, np.dtype[np.int64]]]":
    """The rows' numbers, part by part."""
    return np.array_split(np.arange(job.rows), job.parts)


def _parts(resources: Resources, job: Pass, first: int) -> Generator[tuple[int, Sums], None, None]:
    """All parts from `first` on, in order, whoever observes them."""
    if not resources.grouped:
        yield from sums(job, range(first, job.parts))
        return
    there: set[int] = set()
    following = first
    with closing(_told(resources, job, first)) as told:
        for part in told:
            there.add(part)
            while following in there:
                file = _file(job, following)
                yield following, load_file(file)
                file.unlink()
                following += 1


def _told(resources: Resources, job: Pass, first: int) -> Generator[int, None, None]:
    """Have tasks of Ray Data observe parts, and say of each when its sums are in a file."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # each answer is a block of its own, and is there as soon as it is given
    slots = min(resources.workers, job.parts - first)
    before = nodes()
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)  # nothing else says max_retries yet
        answers = ray.data.from_items([{"slot": slot} for slot in range(slots)], override_num_blocks=slots).map_batches(
            _task,
            fn_kwargs={"job": job, "slots": slots, "first": first, "threads": max(1, int(resources.cpus_per_worker))},
            batch_size=1,
            compute=ray.data.TaskPoolStrategy(size=slots),
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker or None,
            memory=resources.memory or None,
            accelerator_type=None if resources.accelerator in ("cpu", "gpu") else resources.accelerator,
            ray_remote_args_fn=_once,
        )
        try:
            for answer in answers.iter_batches(batch_size=1, prefetch_batches=0):
                if answer["error"][0]:
                    raise pickle.loads(answer["error"][0])
                yield int(answer["part"][0])
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            lost = lost_with("worker", error, before)
            if lost is not None:
                raise lost from error
            raise


def _once() -> dict[str, Any]:
    """What is tried again, the schedule decides."""
    return {"max_retries": 0}


def _task(batch: Mapping[str, Any], *, job: Pass, slots: int, first: int, threads: int) -> Iterator[dict[str, Any]]:
    """One worker: every so many-th part."""
    slot = int(batch["slot"][0])
    torch.set_num_threads(threads)
    try:
        if not job.home.is_dir():
            raise FolderNotShared(slot, str(job.home))
        for part, found in sums(job, range(first + slot, job.parts, slots)):
            half = job.home / f"half-{part}"
            save_file(found, half)
            os.replace(half, _file(job, part))
            yield {"part": [part], "error": [b""]}
    except (LfmError, RuntimeError, OSError, MemoryError) as error:  # Ray Data would hand on nothing but its words
        yield {"part": [-1], "error": [pickle.dumps(error)]}


def _file(job: Pass, part: int) -> Path:
    return job.home / f"part-{part}.safetensors"


def _keep(work: Workspace, total: Sums, done: int) -> None:
    folder = work.scratch / f"sums-{done}"
    folder.mkdir()
    save_file(total, folder / SUMS)
    (folder / STATE).write_text(json.dumps({"parts": done}))
    work.keep(folder)


def _resume(work: Workspace) -> tuple[Sums, int]:
    folder = work.kept()
    if folder is None:
        return {}, 0
    return load_file(folder / SUMS), int(json.loads((folder / STATE).read_text())["parts"])
