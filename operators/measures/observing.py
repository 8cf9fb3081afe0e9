"""Rows -> sums: parts of the rows are observed anywhere, each in its order, and added up in theirs.

How many parts there are does not depend on who observes them, so that any number of workers gives the same bytes.
"""

import json
from collections.abc import Generator
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
from operators.sharing.notices import Preempted
from operators.sharing.pace import Pace
from operators.sharing.parts import each_part
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
    """

    model: Model | Adapter
    base: Model | None
    statistics: tuple[Statistic, ...]
    home: Path
    rows: int
    batch_size: int

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
    with closing(_in_order(work.resources, job, first)) as parts:
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


class Watcher:
    """Observes one part after the other."""

    def __init__(self, device: torch.device, *, job: Pass) -> None:
        whole, home = opened("measure", job.model, job.base)
        model = (whole if isinstance(job.model, Model) else whole.merge_and_unload()).to(device).eval()
        model.requires_grad_(True)  # what PEFT adds freezes the rest
        ids, targets = (np.load(job.home / name, mmap_mode="r") for name in (IDS, TARGETS))
        self.rows = Rows(ids, np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape), targets)
        self.job, self.model, self.device, self.ask = job, model, device, ASKED[architecture_of(home)]
        self.observer = Observer(model, job.statistics)

    def part(self, number: int) -> Sums:
        """The sums over its rows."""
        total: Sums = {}
        numbers = _cut(self.job)[number]
        size = 1 if self.observer.row_by_row else self.job.batch_size
        for start in range(0, len(numbers), size):
            batch = on_device(self.rows, numbers[start : start + size], self.device)
            found = self.observer(batch.where.tolist(), read(batch), partial(self.ask, self.model, batch))
            for name, value in found.items():
                total[name] = total[name].add_(value) if name in total else value.clone()
        return {name: value.cpu().contiguous() for name, value in total.items()}


def _cut(job: Pass) -> "list[np.ndarray[Any, np.dtype[np.int64]]]":
    """The rows' numbers, part by part."""
    return np.array_split(np.arange(job.rows), job.parts)


def _in_order(resources: Resources, job: Pass, first: int) -> Generator[tuple[int, Sums], None, None]:
    """All parts from `first` on, in order, whoever observes them; each file is gone once its sums are taken."""
    files = [job.home / f"part-{part}.safetensors" for part in range(job.parts)]
    there: set[int] = set()
    following = first
    for part in each_part(resources, Watcher, {"job": job}, files, range(first, job.parts)):
        there.add(part)
        while following in there:
            yield following, load_file(files[following])
            files[following].unlink()
            following += 1


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
