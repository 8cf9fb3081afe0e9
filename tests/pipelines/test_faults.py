"""Whoever is killed, and wherever: what is committed stays, and the run goes on to the same end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipelines.__main__ import ROOT
from pipelines.faults import POINTS
from pipelines.lineage import history, runs, states
from pipelines.registry import Registry
from pipelines.storage.local import LocalStorage
from pipelines.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COMMITTED = ("commit: result is in", "step: checkpoints are gone")  # the step is done, whatever its process comes to
ONCE = {"a": 1, "b": 2, "c": 1}  # how often each body is done in an undisturbed run
SERVING = [p for p in POINTS if p.endswith("serving")]
COUNTED = [p for p in POINTS if p.endswith("nodes")]  # only a run on a profile's cluster counts machines
SHARED = [p for p in POINTS if p.endswith("workers")]  # only what trains in groups says how many workers it has
OWN = '''
"""No-ops that count how often they are done."""

from collections.abc import Sequence
from pathlib import Path

from operators.artifact import Dataset, Deployment
from operators.base import operator
from operators.registration import register
from operators.workspace import Workspace


@operator()
def noop(work: Workspace, *, after: Sequence[Dataset] = (), count: str, scarce: bool = False) -> Dataset:
    """Say that it was done; with `scarce` it runs out of memory the first time."""
    name = work.scratch / "checkpoint"
    name.mkdir()
    (name / "manifest.json").write_text("{}")
    work.keep(name)
    before = Path(count).read_text() if Path(count).exists() else ""
    Path(count).write_text(before + "x")
    if scarce and not before:
        raise MemoryError("asked to")
    file = work.scratch / "data.txt"
    file.write_text(Path(count).name)
    return work.save(Dataset, file)


@operator(effect=True)
def named(work: Workspace, *, data: Dataset) -> Dataset:
    """Register it under two aliases, so that one of them moves what is there."""
    for alias in ("first", "second"):
        work.register(data, "thing", alias)
    return data


@operator(effect=True)
def up(work: Workspace, *, data: Dataset) -> Deployment:
    """Say that something is up."""
    file = work.scratch / "deployment.json"
    file.write_text("{}")
    return work.save(Deployment, file, {"url": "nowhere", "name": "nothing", "probe": {}, "model": data.digest})
'''
PIPELINE = """
name: faults
uses: [own.py]
inputs: {text: {dataset: text.txt}}
steps:
  a: {operator: noop, inputs: {after: [text]}, params: {count: COUNT/a}}
  b: {operator: noop, inputs: {after: [a]}, params: {count: COUNT/b, scarce: true}, resources: {memory: 1000}}
  c: {operator: noop, inputs: {after: [a]}, params: {count: COUNT/c}, resources: {cpus_per_worker: 0.5}}
  again: {operator: noop, inputs: {after: [a]}, params: {count: COUNT/c}, resources: {cpus_per_worker: 0.5}}
  d: {operator: named, inputs: {data: b}}
"""
UP = "  e: {operator: up, inputs: {data: c}}\n"
WAIT_S = 120


class Drivers:
    """What starts drivers, and the file that says where the next one dies."""

    def __init__(self, folder):
        self.fault, self.out = folder / "fault", folder / "out.txt"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LFM_FAULTS": str(self.fault)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.drivers"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def start(self, folder, *words):
        """Start one and return its process's id."""
        asked = {"words": [*words, "--mlflow", "none"], "folder": str(folder), "out": str(self.out)}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self):
        """Wait for it and return its exit code."""
        return int(self.process.stdout.readline())

    def lfm(self, folder, *words):
        """Start one and wait for it."""
        self.start(folder, *words)
        return self.ended()


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    made = Drivers(tmp_path_factory.mktemp("drivers"))
    yield made
    made.process.stdin.close()
    made.process.wait(60)


class Folder:
    """A user's folder with the pipeline, and what a run of it has left."""

    def __init__(self, folder, more=""):
        self.folder, self.counts = folder, folder / "counts"
        self.counts.mkdir(parents=True)
        (folder / "own.py").write_text(OWN)
        (folder / "text.txt").write_text("text")
        (folder / "faults.yaml").write_text(PIPELINE.replace("COUNT", str(self.counts)) + more)
        self.store = Store(LocalStorage(folder / ".lfm"))

    def events(self):
        return history(self.store.storage, runs(self.store.storage)[-1])

    def told(self, kind):
        """How often the journal says it."""
        return [e.kind for e in self.events()].count(kind)

    def done(self):
        """How often each step's body was done."""
        return {p.name: len(p.read_text()) for p in self.counts.iterdir()}

    def committed(self):
        """The steps that have a result in the store."""
        names = runs(self.store.storage)
        steps = self.events()[0].data["steps"] if names else {}
        return {n for n, s in steps.items() if self.store.hit(s["fingerprint"]) is not None}

    def digests(self):
        events = self.events()
        found = states(events, events[0].data["steps"])
        assert {s.state for s in found.values()} <= {"done", "reused"}, found
        return {n: s.data["digest"] for n, s in found.items()}


@pytest.fixture(scope="module")
def undisturbed(drivers, tmp_path_factory):
    """The digests and counts of a run that nothing happens to; counts lie elsewhere, and no digest knows where."""
    folder = Folder(tmp_path_factory.mktemp("undisturbed"))
    assert drivers.lfm(folder.folder, "run", "faults.yaml") == 0, drivers.out.read_text()
    assert folder.done() == ONCE
    return folder.digests()


@pytest.mark.parametrize("point", [p for p in POINTS if p not in (*SERVING, *COUNTED, *SHARED)])
def test_a_run_that_was_killed_goes_on_to_the_same_end(point, drivers, undisturbed, tmp_path):
    folder = Folder(tmp_path / "own")
    if point.endswith("reuse"):  # there has to be something
        assert drivers.lfm(folder.folder, "run", "faults.yaml") == 0, drivers.out.read_text()
    drivers.fault.write_text(point)
    first = drivers.lfm(folder.folder, "run", "faults.yaml")
    assert not drivers.fault.exists(), f"nobody got to {point!r}"
    assert first in (-signal.SIGKILL, 0), drivers.out.read_text()  # a step whose process died is tried again
    kept, before = folder.committed(), folder.done()
    assert point not in COMMITTED or before == ONCE, "a step that had committed was tried again"
    if first:
        again = ("resume", "last") if runs(folder.store.storage) else ("run", "faults.yaml")
        assert drivers.lfm(folder.folder, *again) == 0, drivers.out.read_text()
    assert folder.digests() == undisturbed
    for step in kept & before.keys():
        assert folder.done()[step] == before[step], f"{step} was committed and done again"
    assert [v.number for v in Registry(folder.store.storage).versions("thing")] == [1]
    assert Registry(folder.store.storage).aliases("thing") == {"first": 1, "second": 1}


@pytest.mark.parametrize("point", SERVING)
def test_a_run_that_was_killed_while_it_served_serves_again(point, drivers, tmp_path):
    folder = Folder(tmp_path / "own", UP)
    drivers.fault.write_text(point)
    assert drivers.lfm(folder.folder, "run", "faults.yaml") == -signal.SIGKILL, drivers.out.read_text()
    before, told = folder.done(), folder.told("serving")
    driver = drivers.start(folder.folder, "resume", "last")
    until = time.monotonic() + WAIT_S
    while folder.told("serving") == told:
        assert time.monotonic() < until, drivers.out.read_text()
        time.sleep(0.05)
    os.kill(driver, signal.SIGINT)
    assert drivers.ended() == 0
    assert folder.done() == before


def test_there_are_enough_points_and_each_has_its_own_name():
    assert len(set(POINTS)) == len(POINTS) >= 30
