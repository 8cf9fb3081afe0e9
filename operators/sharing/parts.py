"""A large piece of work in parts, each a file: done here, or by workers of Ray Data, and kept as it goes."""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from lfm.errors import LfmError
from operators.code import Code, bring, brought
from operators.resources import Resources
from operators.sharing.notices import FolderNotShared, Preempted, lost_with, nodes
from operators.sharing.pace import Pace
from operators.workspace import Workspace

STATE = "manifest.json"
BLOCKS = 1000  # what Ray Data hands out at most: with more it is busy with itself


class Worker(Protocol):
    """What does parts, in any process; they are known by their numbers."""

    def part(self, number: int) -> "Part":
        """Do one; what comes out depends on nothing but the number."""


Part: TypeAlias = "pa.Table | dict[str, Tensor]"
"""What comes of one: rows, which become a file of Parquet, or tensors by name, which become one of safetensors."""

Open = Callable[..., Worker]
"""A function of a module, called where the work is done with a device and plain arguments."""


def in_parts(work: Workspace, open_worker: Open, arguments: Mapping[str, Any], total: int, name: str) -> list[Path]:
    """Do parts, and go on where an earlier attempt at the step had come.

    Args:
        work: The step's workspace; its resources say how many workers there are.
        open_worker: Makes what does them, once in each process.
        arguments: Plain data and paths that every worker can read.
        total: How many parts there are.
        name: Of this work; a step may have several such.

    Returns:
        The file of each part, in order. How many workers there are changes no byte of them.

    Raises:
        Preempted: The machine is about to be taken away; what is done is kept.
        NodeLost: A worker was lost with its machine.
    """
    home = work.scratch / name
    home.mkdir()
    files = [home / f"part-{number:06d}.parquet" for number in range(total)]
    _take_up(work.kept(), files, name)
    todo = [number for number, file in enumerate(files) if not file.exists()]
    pace, done = Pace(), total - len(todo)
    for _ in each_part(work.resources, open_worker, arguments, files, todo):
        done += 1
        work.progress(done, total)
        leaving = work.leaving()
        if done < total and (leaving or pace.due(done)):
            with pace.kept():
                _keep(work, files, name, done)
        if leaving and done < total:
            raise Preempted(done, total)
    return files


def each_part(
    resources: Resources, open_worker: Open, arguments: Mapping[str, Any], files: Sequence[Path], todo: Sequence[int]
) -> Iterator[int]:
    """Do some parts in any order, and say of each when its file is there.

    Args:
        resources: How many workers there are.
        open_worker: As of `in_parts`.
        arguments: As of `in_parts`.
        files: The file of each part, by its number; in a folder that all workers see.
        todo: The parts.

    Raises:
        NodeLost: A worker was lost with its machine. What one raises on purpose comes as it is.
    """
    if not todo:
        return
    if resources.most > 1:
        yield from _spread(resources, open_worker, arguments, files, todo)
        return
    worker = open_worker(torch.device(resources.device), **arguments)
    for number in todo:
        _write(worker.part(number), files[number])
        yield number


def _spread(
    resources: Resources, open_worker: Open, arguments: Mapping[str, Any], files: Sequence[Path], todo: Sequence[int]
) -> Iterator[int]:
    """Have workers of Ray Data do parts; what comes back are their numbers, the files stay where they were written."""
    import ray

    before = nodes()
    parts = ray.data.from_items([{"part": n} for n in todo], override_num_blocks=min(len(todo), BLOCKS))
    parts.context.enable_progress_bars = False
    job = (pickle.dumps((open_worker, dict(arguments))), brought(), [str(file) for file in files], resources)
    with warnings.catch_warnings():
        # Ray's only way to say so: it announces another one for 2.64.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        done = parts.map_batches(_Doer, batch_size=1, fn_constructor_args=job, **_asked(resources, len(todo)))
    try:
        for row in done.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            yield int(row["part"])
    except ray.exceptions.RayTaskError:  # what nobody raises on purpose
        raise
    except ray.exceptions.RayError as error:
        lost = lost_with("a worker", error, before)
        if lost is None:
            raise
        raise lost from error


def _asked(resources: Resources, parts: int) -> dict[str, Any]:
    """What Ray Data is told of the workers; what is tried again the schedule decides, not Ray."""
    import ray

    return {
        "compute": ray.data.ActorPoolStrategy(size=min(resources.most, parts)),
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": resources.gpus_per_worker or None,
        "memory": resources.memory or None,
        "label_selector": resources.labels,
        "max_restarts": 0,
        "max_task_retries": 0,
    }


class _Doer:
    """One process of Ray Data's; its worker opens with its first part, so that what goes wrong then is told too."""

    def __init__(self, packed: bytes, code: Code, files: Sequence[str], resources: Resources) -> None:
        self.packed, self.code, self.files, self.resources = packed, code, [Path(file) for file in files], resources
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do a part; an error comes as an answer, as Ray Data would hand on nothing but its words."""
        (number,) = map(int, batch["part"])
        try:
            self.worker = self.worker or self._opened()
            _write(self.worker.part(number), self.files[number])
        except (LfmError, RuntimeError, OSError, MemoryError) as error:
            return {"part": [number], "error": [pickle.dumps(error)]}
        return {"part": [number], "error": [b""]}

    def _opened(self) -> Worker:
        home = self.files[0].parent
        if not home.is_dir():
            raise FolderNotShared(0, str(home))
        torch.set_num_threads(max(1, int(self.resources.cpus_per_worker)))
        bring(self.code)
        open_worker, arguments = pickle.loads(self.packed)
        worker: Worker = open_worker(torch.device(self.resources.device), **arguments)
        return worker


def _write(part: Part, file: Path) -> None:
    """A part that is there is whole."""
    new = file.with_suffix(".new")
    if isinstance(part, dict):
        save_file(part, new)
    else:
        pq.write_table(part, new)
    os.replace(new, file)


def _keep(work: Workspace, files: Sequence[Path], name: str, done: int) -> None:
    folder = work.scratch / f"{name}-{done}"
    folder.mkdir()
    for file in files:
        if file.exists():
            os.link(file, folder / file.name)
    (folder / STATE).write_text(json.dumps({"parts": name}))
    work.keep(folder)


def _take_up(kept: Path | None, files: Sequence[Path], name: str) -> None:
    if kept is None or json.loads((kept / STATE).read_text()).get("parts") != name:
        return
    for file in files:
        if (kept / file.name).is_file():
            file.write_bytes((kept / file.name).read_bytes())
