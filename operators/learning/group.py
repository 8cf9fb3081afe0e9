"""What happens in each process of a group that trains together, and how the step hears of it.

They share a folder below the step's scratch: the first worker writes there what it has to tell, and its checkpoints.
"""

import json
import math
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lfm.errors import LfmError
from operators.code import Code, bring
from operators.learning.learner import Place
from operators.learning.loop import Job, Rested, far, train
from operators.learning.stretches import stretches
from operators.resources import Resources
from operators.sharing.heap import mapped
from operators.sharing.notices import FolderNotShared, Notices, Preempted
from operators.training import Training
from operators.workspace import Workspace

TOLD, KEPT = "told.jsonl", "kept"
ASKED, NODE = "asked", "node"
"""Files by which a group whose number of workers may change is asked to end, and says where each worker is."""
LEFT = "left"
"""What such a group answers with after how many steps it ended, where it was told to."""
GROUP = "worker group"
LISTEN_S = 0.2  # how late the step hears of its workers

Make = Callable[..., Job]


class GroupFailed(LfmError, RuntimeError):
    """A group of workers that did not start, or of which one was lost or raised."""

    def __init__(self, who: str, what: str) -> None:
        super().__init__(who, what)
        self.who, self.what = who, what

    def __str__(self) -> str:
        return f"{self.who}: {self.what}, expected it to train to the end. The log has its traceback."

    @property
    def started(self) -> bool:
        """Whether it got as far as its work."""
        return self.who != GROUP


def learn(
    place: Place, make: Make, arguments: Mapping[str, Any], training: Training, work: Any, home: Path
) -> dict[str, int]:
    """Train what `make` puts together; the first worker writes the result to ``trained`` in `home`."""
    with mapped() if place.device.type == "cpu" else nullcontext():
        parts = stretches(training, arguments)
        done = far(work.kept()) if len(parts) > 1 else 0
        for part in parts:
            if part is not parts[-1] and part.training.rest_at is not None and part.training.rest_at <= done:
                continue  # its checkpoint is there
            job = make(place, **part.arguments)
            try:
                trained = train(job, part.training, place, work, home, least=part.first)
            except Rested:
                if part is parts[-1]:
                    raise
        if place.rank == 0:
            (home / "trained").mkdir()
            job.export(trained.weights, home / "trained")
    seen = {"rows": len(job.rows), "cut": job.rows.cut, "left_out": job.rows.left_out}
    return {"steps": trained.steps, "loss_tokens": trained.loss_tokens, **seen}


def packed(
    make: Make, arguments: Mapping[str, Any], training: Training, resources: Resources, home: Path, code: Code
) -> dict[str, Any]:
    """What `worker` takes; the user's modules are there before anything of theirs is unpickled."""
    job = pickle.dumps((make, dict(arguments), training))
    return {"code": code, "job": job, "resources": resources, "home": str(home)}


def worker(packed: Mapping[str, Any]) -> dict[str, int]:
    """One process of the group, in Ray Train."""
    from ray import get_runtime_context
    from ray.train import get_context
    from ray.train.torch import get_device

    resources, home, context = packed["resources"], Path(packed["home"]), get_context()
    if not home.is_dir():
        raise FolderNotShared(context.get_world_rank(), packed["home"])
    _log_to(home / f"worker-{context.get_world_rank()}.log")
    torch.set_num_threads(max(1, int(resources.cpus_per_worker)))
    bring(packed["code"])
    make, arguments, training = pickle.loads(packed["job"])
    place = Place(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=get_device() if resources.gpus else torch.device("cpu"),
        strategy=resources.strategy,
        offload=resources.offload,
    )
    if not resources.elastic:
        return learn(place, make, arguments, training, _Teller(home, place), home)
    (home / f"{NODE}-{place.rank}").write_text(get_runtime_context().get_node_id())
    try:
        return learn(place, make, arguments, training, _Asked(home, place), home)
    except Preempted as told:
        return {LEFT: told.done, "of": told.total}


def _log_to(path: Path) -> None:
    """Send what this process prints from now on to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)


class _Teller:
    """What the loop tells, in a worker."""

    def __init__(self, home: Path, place: Place) -> None:
        self.home, self.place, self.notices = home, place, Notices()
        self.told = 0  # checkpoints

    def progress(self, done: int, total: int, **measures: float) -> None:
        self._tell({"done": done, "total": total, "measures": measures})

    def keep(self, folder: Path) -> None:
        self.told += 1
        self._tell({"keep": folder.name})

    def kept(self) -> Path | None:
        found = [self._newest()]  # the first one's answer counts: it may change meanwhile
        if self.place.world > 1:
            torch.distributed.broadcast_object_list(found, src=0, device=self.place.device)
        return Path(found[0]) if found[0] else None

    def _newest(self) -> str:
        """What the step keeps, when it has heard of all that this process has told."""
        while True:
            heard, _, path = (self.home / KEPT).read_text().partition(" ")
            if int(heard) >= self.told:
                return path
            time.sleep(LISTEN_S)

    def leaving(self) -> bool:
        return self.notices.leaving()

    def _tell(self, line: Mapping[str, Any]) -> None:
        with (self.home / TOLD).open("a") as file:
            file.write(json.dumps(line) + "\n")


class _Asked(_Teller):
    """The same, in a group that may be asked to end."""

    def leaving(self) -> bool:
        return super().leaving() or (not self.place.rank and (self.home / ASKED).exists())


@contextmanager
def listening(work: Workspace, home: Path) -> Iterator["Listener"]:
    """Pass on what the workers tell while the block runs; afterwards what they printed goes to the step's log."""
    listener = Listener(work, home)
    ended = threading.Event()

    def listen() -> None:
        while not ended.wait(LISTEN_S):
            listener.pass_on()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        ended.set()
        thread.join()
        listener.pass_on()
        for log in sorted(home.glob("worker-*.log")):
            sys.stderr.write(f"--- {log.stem}\n{log.read_text(errors='replace')}")
    if listener.failure is not None:
        raise listener.failure


class Listener:
    """Hands on each line once; what the workspace cannot do is said when the workers are done.

    Attributes:
        worked_s: For how many seconds the group has learnt, since its first step.
        left_s: For how many it will, as fast as it was so far.
    """

    def __init__(self, work: Workspace, home: Path) -> None:
        self.work, self.home = work, home
        self.read = self.heard = 0  # bytes, and checkpoints
        self.failure: Exception | None = None
        self.worked_s, self.left_s = 0.0, math.inf
        self._first: tuple[float, int] | None = None
        (home / TOLD).touch()
        self.path = str(work.kept() or "")  # of the newest checkpoint
        self._point()

    def pass_on(self) -> None:
        """Hand on what was told since the last time."""
        with (self.home / TOLD).open() as file:
            file.seek(self.read)
            while (line := file.readline()).endswith("\n"):
                self.read = file.tell()
                self._one(json.loads(line))

    def _one(self, line: Mapping[str, Any]) -> None:
        try:
            if "keep" in line:
                self.heard += 1
                self.work.keep(self.home / line["keep"])
                self.path = str(self.work.kept() or "")
            else:
                self._timed(line["done"], line["total"])
                self.work.progress(line["done"], line["total"], **line["measures"])
        except (LfmError, OSError) as error:
            self.failure = self.failure or error
        if "keep" in line:
            self._point()

    def _timed(self, done: int, total: int) -> None:
        began, first = self._first = self._first or (time.monotonic(), done)
        self.worked_s = time.monotonic() - began
        if done > first:
            self.left_s = (total - done) * self.worked_s / (done - first)

    def _point(self) -> None:
        (self.home / f"{KEPT}.new").write_text(f"{self.heard} {self.path}")
        os.replace(self.home / f"{KEPT}.new", self.home / KEPT)
