"""Streams a merge: base and experts pass through a memory that is given, into files whose every byte has its place.

Headers alone decide the work (`merge_plan`); threads or Ray tasks do it (`crew`), in any order and any number, and
write the same bytes. What is finished is kept, and another attempt goes on from there.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lfm.errors import ShapeError
from lfm.merging.base import Merge
from lfm.weights import Weights, Writer
from operators.artifact import Model, Statistics
from operators.merges.experts import Expert, MergeError, called, clause, reader
from operators.merges.known import Learnt, Measured
from operators.merges.plan import (
    MERGED,
    SCANNED,
    Piece,
    Target,
    bundles,
    layers_of,
    memory,
    num_layers_of,
    pieces,
    targets,
)
from operators.models.language_models import DTYPES, config_of
from operators.models.networks import is_network
from operators.sharing.crew import BUNDLES, Done, Tally, Tasks, Threads, one_thread_each, threads_of
from operators.sharing.notices import Preempted
from operators.sharing.pace import Pace
from operators.workspace import Workspace

SCAN, MERGE = "scan", "merge"
FOUND, STATE = "found.safetensors", "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is merged into what: plain data, with paths that every task can read.

    Attributes:
        learnt: How much of each expert to take, where that was learnt.
        folder: Where the merged weights go.
        dtype: What is stored; ``base`` keeps that of each parameter.
        device: What torch calls what computes.
        shard_bytes: A file takes no further parameter beyond this.
    """

    base: Model
    experts: tuple[Expert, ...]
    statistics: tuple[Statistics, ...]
    method: Merge
    learnt: Learnt | None = None
    dtype: str
    device: str = "cpu"
    folder: Path
    shard_bytes: int


class Engine:
    """A merge as seen from one process: what there is to do, and how to do each piece of it."""

    def __init__(self, job: Job) -> None:
        """Read headers.

        Raises:
            MergeError: An expert's values do not fit.
        """
        method = job.method
        self.job = job
        self.source = Weights(job.base.path)
        self.experts = [reader(called(i, e), e, job.base, self.source) for i, e in enumerate(job.experts)]
        self.measured = Measured(method.needs.statistics, job.statistics, self.source.headers)
        self.targets = planned(job.base, self.source, len(job.experts), method, job.dtype)
        self.writer = Writer(job.folder, {n: t.header for n, t in self.targets.items()}, shard_bytes=job.shard_bytes)
        self.work = {act: work(self.targets, method, act) for act in (SCAN, MERGE)}

    def bytes(self, act: str, number: int) -> int:
        """The most that a piece takes while it is done."""
        piece = self.work[act][number]
        target = self.targets[piece.name]
        measured = self.measured.bytes(target.source, piece.stretch) if self.job.statistics else 0
        return memory(piece, target, self.job.method, measured)

    def do(self, act: str, number: int, found: Mapping[str, Tensor]) -> Tensor | None:
        """Scan a piece, or merge and write it."""
        piece = self.work[act][number]
        target = self.targets[piece.name]
        if act == SCAN:
            return self._scanned(piece, target, found)
        if target.experts:
            self._merged(piece, target, found)
        else:
            self._copied(piece, target)
        return None

    def _scanned(self, piece: Piece, target: Target, found: Mapping[str, Tensor]) -> Tensor | None:
        tally = Tally()
        found = self._here(found)
        for first, base, experts in self._stretches(piece, target):
            known = self._known(target, first, base)
            part = self.job.method.scan(target.source, base, experts, {**found, **known})
            tally.add(first, None if part is None else part.cpu())
        return tally.total()

    def _merged(self, piece: Piece, target: Target, found: Mapping[str, Tensor]) -> None:
        layer = {} if target.layer is None else {"layer": torch.tensor(target.layer)}
        found = self._here({**found, **layer})
        with self.writer.opened(piece.name) as put:
            for first, base, experts in self._stretches(piece, target):
                known = self._known(target, first, base)
                value = self.job.method.merge(piece.name, base, experts, {**found, **known})
                if value.shape != base.shape:
                    fix = f"Correct {type(self.job.method).__name__}.merge."
                    raise ShapeError(f"merged {piece.name!r}", tuple(value.shape), tuple(base.shape), fix)
                put(first, stored(piece.name, value, target.header.dtype).cpu())

    def _copied(self, piece: Piece, target: Target) -> None:
        """What is the base's: as it is, where its dtype does not change."""
        with self.source.opened(target.source) as there, self.writer.opened(piece.name) as put:
            for first, end in piece.stretches():
                put(first, stored(piece.name, there.raw(first, end - first), target.header.dtype))

    def _known(self, target: Target, first: int, base: Tensor) -> Mapping[str, Tensor]:
        learnt = {} if self.job.learnt is None else self.job.learnt(target.source)
        measured = self.measured(target.source, first, tuple(base.shape)) if self.job.statistics else {}
        return self._here({**measured, **learnt})

    def _here(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is known, on the device that computes."""
        return {name: value.to(self.job.device) for name, value in values.items()}

    def _stretches(self, piece: Piece, target: Target) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where each begins, and base and experts there; the next one overwrites them."""
        most = min(piece.stretch, piece.end - piece.first)
        base, experts = torch.empty(most), torch.empty(len(target.experts) * most)
        whole = all(isinstance(self.job.experts[i], Model) for i in target.experts)
        unread = whole and not self.job.method.reads_base
        with ExitStack() as files:
            there = files.enter_context(self.source.opened(target.source))
            opened = [files.enter_context(self.experts[i](target.source)) for i in target.experts]
            for first, end in piece.stretches():
                shape = (end - first,) if self.job.method.elementwise else target.stored.shape
                one = torch.zeros(()).expand(shape) if unread else base[: end - first].view(shape)
                stack = experts[: len(opened) * (end - first)].view(len(opened), *shape)
                if not unread:
                    there.values(first, one)
                for values, out in zip(opened, stack, strict=True):
                    values(first, one, out)
                yield first, one.to(self.job.device), stack.to(self.job.device)


def planned(base: Model, source: Weights, num_experts: int, method: Merge, dtype: str) -> dict[str, Target]:
    """The parameters of the merged model.

    Raises:
        LfmError: The method stacks layers that are not there, or those of a network, each of its own width.
    """
    number = num_layers_of(config_of(base.path))
    if is_network(base.path) and method.layers(num_experts, layers_of(source.headers)[1]) is not None:
        what = "a network for images, whose layers are of widths of their own"
        raise MergeError((clause("base", what, "a model of layers that are alike", "Choose another method."),))
    stored_as = None if dtype == "base" else DTYPES[dtype]
    return targets(source.headers, method, num_experts, dtype=stored_as, num_layers=number)


def work(found: Mapping[str, Target], method: Merge, act: str) -> list[Piece]:
    """All pieces of a pass, or of the merge itself."""
    at_once = SCANNED if act == SCAN else MERGED
    return [
        piece
        for name, target in found.items()
        if act == MERGE or target.experts
        for piece in pieces(name, target, elementwise=method.elementwise, at_once=at_once)
    ]


def stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A merged value as it is written.

    Raises:
        MergeError: Its dtype cannot hold it, or it is no number.
    """
    if not value.numel() or not dtype.is_floating_point or value.dtype == dtype != torch.float32:
        return value
    cast = value.to(dtype)
    if not _finite(cast):
        word = str(dtype).removeprefix("torch.")
        fix = "Choose a dtype with more range, or look for it in the experts."
        raise MergeError((clause(f"merged {name!r}", f"infinite or not a number as {word}", "finite values", fix),))
    return cast


def _finite(value: Tensor) -> bool:
    """Whether all values are finite; their sum is none where one of them is not, and is quick."""
    wide = value if value.dtype.itemsize > 1 else value.float()
    return bool(wide.sum().isfinite()) or bool(torch.stack(wide.float().aminmax()).isfinite().all())


def stream(work: Workspace, job: Job, *, memory_budget: int) -> None:
    """Merge, from where an earlier attempt has come.

    Args:
        work: The step's workspace; its resources say who does it.
        job: What is merged; its folder is made here.
        memory_budget: Bytes that each process may take for values.

    Raises:
        MergeError: A value does not fit.
        Preempted: A machine is about to be taken away; what was finished is kept.
    """
    with one_thread_each():
        _Stream(work, Engine(job), memory_budget).run()


class _Stream:
    """One attempt."""

    def __init__(self, work: Workspace, engine: Engine, memory_budget: int) -> None:
        self._work, self._engine, self._pace = work, engine, Pace()
        self._found: dict[str, Tensor] = {}
        self._passes, self._files = 0, list[str]()  # how much is finished: passes, and files of weights
        self._done, self._total = 0, 0
        job, asks = engine.job, work.resources
        self._tasks = Tasks(Engine, job, asks, budget=memory_budget, home=job.folder) if asks.grouped else None
        self._threads = Threads(engine, threads=threads_of(asks), budget=memory_budget)

    def run(self) -> None:
        engine, method = self._engine, self._engine.job.method
        engine.job.folder.mkdir()
        self._go_on()
        engine.writer.allocate(but=self._files)
        missing = self._missing()
        left = [n for numbers in missing.values() for n in numbers]
        self._total = method.passes * len(engine.work[SCAN]) + len(engine.work[MERGE])
        self._done = self._passes * len(engine.work[SCAN]) + len(engine.work[MERGE]) - len(left)
        while self._passes < method.passes:
            total = self._each(SCAN, range(len(engine.work[SCAN])), {})
            if total is not None:
                self._found |= method.settle(total, self._found)
            self._passes += 1
        self._each(MERGE, left, missing)

    def _missing(self) -> dict[str, set[int]]:
        """By file of weights the numbers of the pieces that it lacks."""
        writer = self._engine.writer
        home = {name: shard.file for shard in writer.shards for name in shard.offsets}
        missing: dict[str, set[int]] = {s.file: set() for s in writer.shards if s.file not in self._files}
        for number, piece in enumerate(self._engine.work[MERGE]):
            if home[piece.name] in missing:
                missing[home[piece.name]].add(number)
        return missing

    def _each(self, act: str, numbers: Sequence[int], missing: dict[str, set[int]]) -> Tensor | None:
        """Do pieces; keep what is finished when it is time, or when a machine is about to go."""
        tally = Tally()
        for done, part, leaving in self._crew(act, numbers):
            tally.take(part)
            for file, lacks in list(missing.items()):
                lacks.difference_update(done)
                if not lacks:
                    self._files.append(file)
                    del missing[file]
            self._done += len(done)
            self._work.progress(self._done, self._total)
            left = self._done < self._total
            leaving = left and (leaving or self._work.leaving())
            if leaving or (left and self._pace.due(self._done)):
                self._keep()
            if leaving:
                raise Preempted(self._done, self._total)
        return tally.total()

    def _crew(self, act: str, numbers: Sequence[int]) -> Iterator[Done]:
        if self._tasks is None:
            return self._threads.each(act, numbers, self._found)
        work = [self._engine.work[act][n] for n in numbers]
        shares = bundles(work, BUNDLES * self._work.resources.most)
        return self._tasks.each(act, [[numbers[i] for i in share] for share in shares], self._found)

    def _keep(self) -> None:
        """Files that are whole are linked, not copied: a checkpoint costs what it takes to hash them."""
        with self._pace.kept():
            folder = self._work.scratch / f"finished-{self._done}"
            folder.mkdir()
            for file in self._files:
                linked(self._engine.job.folder / file, folder / file)
            if self._engine.job.learnt is not None:
                self._engine.job.learnt.keep(folder)
            if self._found:
                save_file(self._found, folder / FOUND)
            (folder / STATE).write_text(json.dumps({"passes": self._passes, "shards": self._files}))
            self._work.keep(folder)

    def _go_on(self) -> None:
        folder = self._work.kept()
        if folder is None:
            return
        state = json.loads((folder / STATE).read_text())
        if "shards" not in state:  # of the learning that came before
            return
        self._passes, self._files = state["passes"], state["shards"]
        self._found = load_file(folder / FOUND) if (folder / FOUND).is_file() else {}
        for file in self._files:
            linked(folder / file, self._engine.job.folder / file)


def linked(source: Path, target: Path) -> None:
    """The same file in another folder; a copy where that is on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
