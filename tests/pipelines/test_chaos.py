"""A process that is killed and nodes that go while a step learns: it goes on from a checkpoint to the same end."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from operators.code import bring
from operators.learning.learner import Place
from operators.learning.loop import train
from operators.training import Training
from pipelines.__main__ import ROOT
from pipelines.lineage import history, runs, states
from pipelines.source import pack
from pipelines.storage.local import LocalStorage
from pipelines.view import measured
from tests.operators import small
from tests.pipelines.nodes import Nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WAIT_S = 180
STEPS, EVERY = 400, 10
LEARNER = Path(__file__).with_name("slow_learner.py")
PIPELINE = f"""
name: chaos
uses: [own.py]
steps:
  line:
    operator: learn
    params: {{folder: FOLDER, max_steps: {STEPS}, checkpoint_every: {EVERY}, batch_size: 8, learning_rate: 0.01}}
    resources: RESOURCES
"""


class Run:
    """One run in a process of its own, and what it has said."""

    def __init__(self, folder, resources, address, store):
        self.folder, self.places = folder, folder / "places"
        self.places.mkdir(parents=True, exist_ok=True)
        (folder / "own.py").write_text(LEARNER.read_text())
        text = PIPELINE.replace("FOLDER", str(self.places)).replace("RESOURCES", json.dumps(resources))
        (folder / "chaos.yaml").write_text(text)
        self.storage = LocalStorage(folder / store)
        self.out = folder / f"{store}.txt"
        words = ["run", "chaos.yaml", "--store", store, "--address", address, "--mlflow", "none"]
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", *words], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def events(self, kind=""):
        found = runs(self.storage)
        return [e for e in history(self.storage, found[0]) if kind in ("", e.kind)] if found else []

    def attempts(self):
        """The steps of the optimizer that each attempt has measured, with their losses."""
        return [
            {line["done"]: line["measures"]["loss"] for line in measured(self.storage, e.data["log"])}
            for e in self.events("start")
        ]

    def until(self, what, number=1):
        """Wait until there are so many."""
        limit = time.monotonic() + WAIT_S
        while len(found := what()) < number:
            assert self.process.poll() is None, self.out.read_text()
            assert time.monotonic() < limit, self.out.read_text()
            time.sleep(0.05)
        return found

    def learns(self, attempt, rank=0):
        """Wait until an attempt has learnt for more than an interval, and say where one of its workers is."""
        self.until(lambda: self.events("start"), attempt)
        before = max((max(a, default=0) for a in self.attempts()[: attempt - 1]), default=0)
        self.until(lambda: [s for s in self.attempts()[attempt - 1] if s > before], EVERY + 5)
        newest = max(self.places.glob(f"{rank}-*.json"), key=lambda p: p.name.split("-")[1])
        return json.loads(newest.read_text())

    def end(self):
        """The digest of what it made."""
        assert self.process.wait(WAIT_S) == 0, self.out.read_text()
        return states(self.events(), ["line"])["line"].data["digest"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Nodes(tmp_path_factory.mktemp("nodes"))
    yield made
    made.end()


@pytest.fixture
def nodes(cluster):
    """The cluster, which has no node but its head's before and after."""
    yield cluster
    cluster("clear")


def named(numbers, place):
    """The name of the node where a process is."""
    return next(name for name, number in numbers.items() if number == place["node"])


@pytest.mark.parametrize(
    "resources", [{"workers": 1}, {"workers": 2, "strategy": "ddp"}], ids=["in its own process", "in a group"]
)
def test_a_step_survives_its_process_its_node_and_the_head(nodes, tmp_path, resources):
    workers, rank = resources["workers"], resources["workers"] - 1
    numbers = {name: nodes("add", name, 1) for name in "ab"[:workers]}
    undisturbed = Run(tmp_path, resources, nodes.address, "undisturbed")
    expected = undisturbed.end()
    (curve,) = undisturbed.attempts()

    run = Run(tmp_path, resources, nodes.address, "disturbed")
    os.kill(run.learns(1, rank)["pid"], signal.SIGKILL)

    place = run.learns(2, rank)
    nodes("drain", named(numbers, place), 600)
    # Nothing can hold it now, so it waits for a node that does.
    assert "asks for" in run.until(lambda: run.events("wait"))[0].data["why"]
    nodes("remove", named(numbers, place))
    numbers["c"] = nodes("add", "c", 1)

    place = run.learns(3, rank)
    nodes("remove", named(numbers, place))
    nodes("add", "d", 1)

    run.learns(4, rank)
    nodes("restart")
    assert run.end() == expected

    failed = Counter(e.data["class"] for e in run.events("fail"))
    assert failed == {"other": 1, "preemption": 1, "node": 1}, run.out.read_text()
    attempts = run.attempts()
    assert len(attempts) == 4
    for before, after in itertools.pairwise(attempts):
        assert max(before) - min(after) < EVERY, "no more than an interval is learnt again"
    assert min(attempts[2]) == max(attempts[1]) + 1, "after a notice nothing is"
    merged = {step: loss for attempt in attempts for step, loss in attempt.items()}
    assert merged == curve


@pytest.mark.soak
def test_a_step_takes_more_workers_when_a_node_comes_and_goes_on_with_fewer_when_it_is_lost(nodes, tmp_path):
    waits = [tmp_path / "places" / f"wait-{step}" for step in (60, 120)]
    waits[0].parent.mkdir()
    for file in waits:
        file.touch()
    nodes("add", "a", 1)
    run = Run(tmp_path, {"workers": [1, 2], "strategy": "ddp"}, nodes.address, "elastic")
    run.learns(1)
    nodes("add", "b", 1)
    run.until(lambda: list((tmp_path / "elastic").rglob("training/group-1/asked")))
    waits[0].unlink()
    run.until(lambda: [step for step in run.attempts()[0] if step > 115])
    nodes("remove", "b")
    run.until(lambda: run.events("workers"), 3)
    waits[1].unlink()
    run.end()
    assert run.events("fail") == [], run.out.read_text()
    told = [(e.data["workers"], e.data["why"]) for e in run.events("workers")]
    assert told == [(1, "1 to 2 may share the work"), (2, "there is room for more"), (1, "a machine was lost")]
    (curve,) = run.attempts()
    assert [curve[step] for step in range(1, STEPS + 1)] == pytest.approx(alone(tmp_path), rel=1e-5)


def alone(folder):
    """The losses of one process to which nothing happens."""
    (own,) = bring(pack(folder, ("own.py",)), str(folder))
    work = small.Work(folder / "alone")
    training = Training(max_steps=STEPS, batch_size=8, learning_rate=0.01)
    train(own.line(lambda step: None), training, Place(), work, work.scratch)
    return work.curve()
