"""What a run's journal costs: to write it, to read it, and until a resumed run knows what to do.

A run of many steps was killed when its journal had many events, each a segment of its own, which is the worst case.
`lfm resume` is timed until it would open Ray, with the journal packed as a driver packs it and without the packs; in a
folder, and on an S3 that listens on loopback, where the requests are counted too.
"""

import contextlib
import io
import os
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from loopback_s3 import loopback
from rounds import Figure, command_line, compared, interleaved, said
from step_cost import Chain

from pipelines.beginning import described, inputs_of
from pipelines.commands import resume
from pipelines.files import opened
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Event, Journal, history, new_run, states
from pipelines.plan import Plan, plan
from pipelines.spec import dump
from pipelines.storage.base import Storage, at_once
from pipelines.storage.opening import open_storage
from pipelines.store import Result, Store, canonical

PACKED, BARE = "packed", "a request for each segment"
FILE, SEGMENT, STEP = "a file and fsync", "a segment", "a step"
WRITES = 300  # so many of each in a round


class Killed:
    """What a run of a chain leaves behind that was killed when half of its steps were done."""

    def __init__(self, home: Path, steps: int, events: int) -> None:
        self.storage = open_storage(str(home / "store"))
        chain = Chain(home, steps)
        read = opened(str(chain.written(0)))
        made = plan(read.spec, Looks(home / "inputs.sqlite", Store(self.storage)), read.catalog)
        self.steps, self.events = tuple(made.steps), events
        with mock.patch("os.fsync"):  # nobody waits for the disk while it is made
            for name in self.steps[: steps // 2]:
                self._done(made, name)
            self.run = self._written(made, events)

    def _done(self, made: Plan, name: str) -> None:
        step, store = made.steps[name], Store(self.storage)
        folder = self.storage.scratch()
        (folder / "number.txt").write_text(name)
        digest = store.put(folder, step.kind, {})
        store.commit(Result(fingerprint=step.fingerprint, kind=step.kind, digest=digest, run="r", step=name))

    def _written(self, made: Plan, events: int) -> str:
        """The run's name; its steps fail and are started again until there are enough events."""
        journal = Journal.claim(self.storage, new_run(made.spec.name))
        data = {
            "run": journal.run,
            "spec": dump(made.spec),
            "uses": list(made.spec.code.uses),
            "files": [list(f) for f in made.spec.code.files],
            "until": "",
            "retries": events,
            "address": "local",
            "mlflow": "none",
            "inputs": inputs_of(made),
            "steps": {n: described(made, n) for n in made.steps},
            "version": "0",
        }
        journal.write([Event("started", data=data)])
        for number in range(1, events):
            name = self.steps[number * len(self.steps) // events]
            journal.write([_attempted(name, number, journal.run)])
        return journal.run

    def copied(self, to: Storage) -> None:
        """The same in another storage."""
        keys = [k for folder in ("runs", "results", "artifacts") for k in self.storage.list(folder)]
        at_once(lambda k: to.put_if_absent(k, self.storage.read(k) or b""), keys)


def _attempted(step: str, number: int, run: str) -> Event:
    """What is said of a step as it is started, or fails."""
    about: dict[str, Any] = {"attempt": number, "log": f"runs/{run}/logs/{step}/{number}.log"}
    if number % 2:
        return Event("start", step, about, time.time())
    wrong = {"error": "OSError", "class": "storage", "sentence": "read timed out", "seconds": 1.5}
    return Event("fail", step, {**about, **wrong}, time.time())


class Enough(BaseException):
    """The run would open Ray now."""


class Resumed:
    """What goes on with the run on one storage, with packs or without, and leaves everything as it was."""

    def __init__(self, storage: Storage, killed: Killed, *, asked: Counter[str]) -> None:
        self.storage, self.killed, self.asked = storage, killed, asked
        self.there = frozenset(storage.list("runs"))
        self.packs = {k: storage.read(k) or b"" for k in storage.list(f"runs/{killed.run}/packs")}
        self.requests: dict[tuple[str, bool], int] = {}

    def read(self, *, packed: bool) -> float:
        """Seconds until the state of each step is known."""
        with self._kept(packed=packed):
            began, asked = time.perf_counter(), self.asked.total()
            states(history(self.storage, self.killed.run), self.killed.steps)
            self.requests["read", packed] = self.asked.total() - asked
            return time.perf_counter() - began

    def decided(self, *, packed: bool) -> float:
        """Seconds of `lfm resume` until it would open Ray."""
        took = 0.0

        def opens(address: str) -> None:
            nonlocal took
            took = time.perf_counter() - began
            self.requests["decided", packed] = self.asked.total() - asked
            raise Enough

        words = Namespace(store=self.storage.uri, run="last", mlflow="none", json=False, address="local")
        with (
            self._kept(packed=packed),
            mock.patch("pipelines.commands.run.opened", opens),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(Enough),
        ):
            began, asked = time.perf_counter(), self.asked.total()
            resume.act(words)
        return took

    @contextlib.contextmanager
    def _kept(self, *, packed: bool) -> Iterator[None]:
        if not packed:
            self.storage.delete(f"runs/{self.killed.run}/packs")
        yield
        for key in set(self.storage.list("runs")) - self.there:
            self.storage.delete(key)
        at_once(lambda key: self.storage.put_if_absent(key, self.packs[key]), self.packs)


def reading(killed: Killed, resumed: Resumed, where: str, rounds: int) -> list[Figure]:
    """Of one kind of storage."""
    what = f"a journal of {killed.events} events {where}, {PACKED}"
    found = []
    for verb, label, aim in (("read", "read", ""), ("decided", "lfm resume until it would open Ray", "< 2 s")):
        rivals = {n: partial(_once, getattr(resumed, verb), n == PACKED) for n in (PACKED, BARE)}
        values = interleaved(rivals, rounds)
        found.append(compared(values, PACKED, BARE, unit="s", label=f"{what}, {label}", aim=aim))
        asked = {n: [float(resumed.requests[verb, n == PACKED])] for n in values}
        if all(v[0] for v in asked.values()):
            found.append(compared(asked, PACKED, BARE, unit="requests", label=f"{what}, {label}"))
    return found


def _once(act: Callable[..., float], packed: bool, number: int) -> float:
    return act(packed=packed)


def writing(home: Path, rounds: int) -> list[Figure]:
    """What is on disk before a step starts and when it is done, against as many bytes in one file."""
    storage = open_storage(str(home / "written"))

    def each(act: Callable[[Journal, int], None]) -> Callable[[int], float]:
        def timed(_: int) -> float:
            journal = Journal.claim(storage, new_run("written"))
            began = time.perf_counter()
            for number in range(WRITES):
                act(journal, number)
            return 1e3 * (time.perf_counter() - began) / WRITES

        return timed

    def file(journal: Journal, number: int) -> None:
        with (storage.scratches / "file").open("wb") as out:
            out.write(canonical(asdict(_attempted("s", number, journal.run))))
            out.flush()
            os.fsync(out.fileno())

    def segment(journal: Journal, number: int) -> None:
        journal.write([_attempted("s", number, journal.run)])

    def step(journal: Journal, number: int) -> None:
        store = Store(storage)
        segment(journal, 2 * number + 1)
        folder = storage.scratch()
        (folder / "number.txt").write_text(f"{journal.run} {number}")
        digest = store.put(folder, "dataset", {})
        store.commit(Result(fingerprint=digest, kind="dataset", digest=digest, run=journal.run, step="s"))
        segment(journal, 2 * number + 2)

    values = interleaved({FILE: each(file), SEGMENT: each(segment), STEP: each(step)}, rounds)
    return [
        compared(values, SEGMENT, FILE, unit="ms", label="a segment of one event, its share of a pack included"),
        compared(values, STEP, FILE, unit="ms", label="all that a step writes: two segments, an artifact, its result"),
    ]  # fmt: skip


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=3)
    parser.add_argument("--steps", type=int, default=1000, help="of the run")
    parser.add_argument("--events", type=int, default=10_000, help="of its journal")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="journal-") as folder, loopback() as (bucket, requests):
        home = Path(folder)
        figures = writing(home, asked.rounds)
        killed = Killed(home, asked.steps, asked.events)
        in_a_folder = Resumed(killed.storage, killed, asked=requests)
        figures += reading(killed, in_a_folder, "in a folder", asked.rounds)
        killed.copied(on_s3 := open_storage(f"s3://{bucket}/store"))
        figures += reading(killed, Resumed(on_s3, killed, asked=requests), "on S3 on loopback", 1)  # takes minutes
    said(figures, asked)


if __name__ == "__main__":
    main()
