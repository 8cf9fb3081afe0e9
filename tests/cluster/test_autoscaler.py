"""A pipeline on a cluster that grows with what its steps ask for, under Ray's real autoscaler."""

import inspect
import json
import subprocess
import sys
import time

import pytest

from cluster import look as look_module
from cluster.seen import look
from pipelines.__main__ import main
from pipelines.lineage import history, runs
from pipelines.profiles import read_profile
from pipelines.storage.opening import open_storage
from tests.cluster.autoscaler import autoscaling

PROFILE = """
name: grows
place: address
address: "{address}"
storage: {store}
shared: [/]
head: {{cpus: 1, memory_gib: 1}}
groups:
  cpu: {{cpus: 1, memory_gib: 1, max_nodes: 1, idle_timeout_s: 2}}
  l4: {{cpus: 1, memory_gib: 1, gpus: 1, accelerator: L4, max_nodes: 1, idle_timeout_s: 2}}
  h100: {{cpus: 1, memory_gib: 1, gpus: 2, accelerator: H100, max_nodes: 1, idle_timeout_s: 2}}
"""
STEPS = """
name: grows
uses: [noop.py]
inputs:
  text: {dataset: TEXT}
steps:
  plain: {operator: noop, inputs: {after: [text]}}
  one: {operator: noop, inputs: {after: [plain]}, resources: {gpus_per_worker: 1, accelerator: L4}}
  two: {operator: noop, inputs: {after: [one]}, resources: {gpus_per_worker: GPUS, accelerator: H100}}
"""
GROUPS = ("cpu", "l4", "h100")
IDLE_S = 300.0  # how long the last machine may take to go, on a machine that is busy


@pytest.fixture
def written(project, tmp_path, monkeypatch):
    """Writes pipeline and profile, and gives the profile's file and its store."""
    monkeypatch.chdir(project.folder)

    def write(address="127.0.0.1:1", gpus=2):
        steps = STEPS.replace("GPUS", str(gpus)).replace("TEXT", f"{project.folder}/text.txt")
        (project.folder / "grows.yaml").write_text(steps)
        profile = project.folder / "profile.yaml"
        profile.write_text(PROFILE.format(address=address, store=tmp_path / "store"))
        return str(profile), tmp_path / "store"

    return write


def test_what_no_group_can_grow_to_is_refused_before_anybody_is_asked_for_it(written, capsys):
    profile, store = written(gpus=4)
    assert main(["run", "grows.yaml", "--cluster", profile]) == 2
    said = capsys.readouterr().err
    assert "step 'two': asks for 4 GPUs, expected at most 3, which is all there is." in said
    profile, store = written(gpus=3)
    assert main(["run", "grows.yaml", "--cluster", profile]) == 2
    assert "step 'two': asks for 1 x 1 CPU and 3 GPUs, each on one machine" in capsys.readouterr().err
    assert not runs(open_storage(str(store)))


@pytest.mark.ray
@pytest.mark.slow
def test_each_group_comes_when_a_step_asks_for_it_and_goes_when_none_does(written):
    profile, store = written()
    with autoscaling(read_profile(profile)) as (address, environment):
        profile, _ = written(address)
        words = [sys.executable, "-m", "pipelines", "run", "grows.yaml", "--cluster", profile]
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
        until = time.monotonic() + IDLE_S
        now = look(address, environment)
        while sum(n.alive for n in now.nodes) > 1:
            assert time.monotonic() < until, now
            now = look(address, environment)
        alone = [sys.executable, "-c", inspect.getsource(look_module), address]  # as the head of a cloud is asked
        asked = subprocess.run(alone, env=environment, cwd="/", check=True, capture_output=True, text=True)
        assert {n["group"] for n in json.loads(asked.stdout)["nodes"]} == {"head", *GROUPS}

    # Each was there once, for its own step, and has gone: what the cluster has seen.
    assert sorted(n.group for n in now.nodes) == sorted(("head", *GROUPS))
    began = {n.group: n.began for n in now.nodes}
    assert began["cpu"] < began["l4"] < began["h100"]

    # And what the run has written down, from none to none but for the last step's.
    (run,) = runs(open_storage(str(store)))
    events = history(open_storage(str(store)), run)
    assert events[-1].data["status"] == "done"
    counts = [e.data["nodes"] for e in events if e.kind == "nodes"]
    assert counts[0] == {"cpu": 1}
    assert {group for count in counts for group in count} == {*GROUPS}
    assert all(set(count.values()) == {1} for count in counts)
