"""A run on a cluster of somebody else's: it outlives who submitted it, and the cluster's end takes no log with it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cluster import processes
from pipelines.__main__ import ROOT, main
from pipelines.lineage import history, runs
from pipelines.storage.local import LocalStorage
from tests.cluster.machines import cluster_up

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WAIT_S = 300.0
OWN = '''
"""A step that waits for a file, and keeps what it has when its run is to end."""

import time
from collections.abc import Sequence
from pathlib import Path

from operators.artifact import Dataset
from operators.base import operator
from operators.sharing.notices import Preempted
from operators.workspace import Workspace


@operator()
def waits(work: Workspace, *, after: Sequence[Dataset] = (), file: str = "") -> Dataset:
    """Wait."""
    while file and not Path(file).exists():
        if work.leaving():
            print("it kept what it had")
            raise Preempted(1, 2)
        time.sleep(0.05)
    made = work.scratch / "data.txt"
    made.write_text("made")
    return work.save(Dataset, made)
'''
PIPELINE = """
name: small
uses: [waiting.py]
inputs: {text: {dataset: text.txt}}
steps:
  a: {operator: waits, inputs: {after: [text]}}
  b: {operator: waits, inputs: {after: [a]}, params: {file: FILE}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    (project / "waiting.py").write_text(OWN)
    (project / "text.txt").write_text("some text")
    (project / "small.yaml").write_text(PIPELINE.replace("FILE", str(tmp_path / "go")))
    monkeypatch.chdir(project)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where it is written down what is up
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # which Ray would prefer to the profile's
    return project


def until(holds, *said):
    """Wait for something."""
    end = time.monotonic() + WAIT_S
    while not (found := holds()):
        assert time.monotonic() < end, [one() for one in said]
        time.sleep(0.2)
    return found


def test_it_outlives_its_submitter_ends_when_told_from_elsewhere_and_goes_on(folder, tmp_path, capsys, monkeypatch):
    storage = LocalStorage(tmp_path / "store")
    with cluster_up(tmp_path) as typed:
        profile = str(typed.profile)
        submit = ["submit", "small.yaml", "--cluster", profile, "--label", "team=research", "--priority", "3"]

        with (tmp_path / "out").open("wb") as out:
            submitter = subprocess.Popen(
                [sys.executable, "-m", "pipelines", *submit],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

        def started():
            return [r for r in runs(storage) if [e for e in history(storage, r) if (e.kind, e.step) == ("start", "b")]]

        (run,) = until(started, (tmp_path / "out").read_text, submitter.poll)
        submitter.send_signal(signal.SIGKILL)
        submitter.wait()

        assert main([*submit, "--detach", "--json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out) == {"run": run, "job": f"{run}-attempt-1", "submitted": False}
        assert "goes on already" in said.err

        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(processes, "host", lambda: "elsewhere")
            assert main(["ps", "--cluster", profile, "--json"]) == 0
            (listed,) = json.loads(capsys.readouterr().out)
            assert (listed["run"], listed["status"]) == (run, "running")
            assert (listed["labels"], listed["priority"]) == ({"team": "research"}, 3)
            assert main(["stop", run, "--cluster", profile]) == 0
            assert f"run {run} stopped" in capsys.readouterr().out
        last = history(storage, run)[-1]
        assert last.data == {"status": "interrupted", "why": "it was asked to stop"}
        assert main(["logs", run, "b", "--cluster", profile]) == 0
        said = capsys.readouterr().out
        assert "it kept what it had" in said
        assert "failed with Stopped: its run is about to end, expected it to go on for all 2 steps." in said

        (tmp_path / "go").touch()
        assert main(submit) == 0
        said = capsys.readouterr()
        assert f"submitted as job {run}-attempt-2" in said.err
        assert "package" in said.err
        assert "there already" in said.err
        told = [line.partition(" ")[2].partition(",")[0] for line in said.out.splitlines()]
        assert {"a: reused", "b: started", "machines besides the head: 1 of cpu"} <= {*told}
        assert told[-1] == "run done"

    assert main(["logs", run, "--cluster", profile]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("run done")
    assert main(["show", run, "--cluster", profile, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    ends = {e.step: e.data for e in history(storage, run) if e.kind == "commit"}
    assert {n: end["group"] for n, end in ends.items()} == {"a": "cpu", "b": "cpu"}
    for step in ("a", "b"):
        assert said["steps"][step]["estimate"]["group"] == "cpu"
        assert said["steps"][step]["took"]["hours"]["cpu"] > 0
    whole, parts = said["took"]["all"]["hours"], [said["took"][n]["hours"] for n in ("head", "idle")]
    parts += [s["took"]["hours"] for s in said["steps"].values()]
    assert whole == pytest.approx({g: sum(p.get(g, 0.0) for p in parts) for g in whole})
    assert main(["show", run, "--cluster", profile]) == 0
    assert "what it took  machines" in capsys.readouterr().out
