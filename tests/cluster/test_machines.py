"""A cluster of processes on this machine: they outlive who starts them, and nothing else ends with them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import machines
from cluster.machines import MARK, HalfUp, NotUp, OtherCluster, Record, digest, down, located, up
from cluster.profile import Group, Head, Profile
from tests.cluster.machines import Typed, cluster_up

PROFILE = Profile(
    name="p",
    place="local",
    head=Head(cpus=1, memory_gib=1),
    groups={
        "gpu": Group(
            cpus=2,
            memory_gib=4,
            gpus=1,
            accelerator="L4",
            min_nodes=2,
            max_nodes=3,
            market="spot",
            labels={"team": "research"},
        )
    },
)


def recorded(records, *, changed=None, **fields):
    record = {
        "name": "p", "digest": digest(PROFILE), "host": machines.processes.host(), "folder": "/nowhere/lfm-up-1",
        "token": "", "dashboard": "http://127.0.0.1:1",
    }  # fmt: skip
    records.mkdir(exist_ok=True)
    (records / "p.json").write_text(json.dumps({**record, **fields}))


def marked(folder):
    """The processes that carry a cluster's name."""
    found = []
    for process in Path("/proc").glob("[1-9]*"):
        try:
            if f"{MARK}={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            pass
    return found


def test_each_node_is_told_what_its_machine_has_and_to_which_group_it_belongs():
    head, first, second = machines._machines(PROFILE)
    assert [n.name for n in (head, first, second)] == ["head", "gpu-1", "gpu-2"]
    assert "--num-cpus=0" in machines._words(head), "it is there for the drivers alone"
    words = machines._words(first)
    assert {"--num-cpus=2", "--num-gpus=1", f"--memory={4 << 30}"} <= {*words}
    labels = "ray.io/accelerator-type=L4,ray.io/market-type=spot,ray.io/node-group=gpu,team=research"
    assert f"--labels={labels}" in words


def test_what_is_not_up_is_said_so_and_need_not_be_ended(tmp_path):
    assert down("p", tmp_path) is False
    with pytest.raises(NotUp, match="cluster 'p': it is not up, expected it to be"):
        located(PROFILE, tmp_path)
    recorded(tmp_path)  # a start that has not come to its end
    with pytest.raises(HalfUp, match="only a part of it has come up or is left, expected all of it"):
        located(PROFILE, tmp_path)
    recorded(tmp_path, address="127.0.0.1:1", nodes={"head": {**machines.processes.this(), "born": 1.0}})
    with pytest.raises(HalfUp, match="only a part of it has come up or is left, expected all of it"):
        located(PROFILE, tmp_path)


def test_a_cluster_of_another_profile_or_machine_is_left_alone(tmp_path):
    living = {"head": machines.processes.this()}
    recorded(tmp_path, digest="another", address="127.0.0.1:1", nodes=living)
    for act in (up, located):
        with pytest.raises(OtherCluster, match="it was started from another profile"):
            act(PROFILE, tmp_path)
    recorded(tmp_path, host="elsewhere", address="127.0.0.1:1", nodes=living)
    for act in (up, located):
        with pytest.raises(OtherCluster, match="it is up on 'elsewhere', expected this profile's on this machine"):
            act(PROFILE, tmp_path)
    with pytest.raises(OtherCluster):
        down("p", tmp_path)
    assert (tmp_path / "p.json").exists()


def test_a_cluster_that_lives_is_one_at_an_address(tmp_path):
    recorded(tmp_path, token="file:/t", address="127.0.0.1:1", nodes={"head": machines.processes.this()})
    there = located(PROFILE, tmp_path)
    assert (there.place, there.address, there.dashboard, there.token) == (
        "address", "127.0.0.1:1", "http://127.0.0.1:1", "file:/t"
    )  # fmt: skip


def test_down_ends_what_carries_the_clusters_name_and_nothing_else(tmp_path):
    folder = tmp_path / "lfm-up-1"
    folder.mkdir()
    sleeps = [sys.executable, "-c", "input()"]
    ours, other, nobodys = (
        subprocess.Popen(sleeps, stdin=subprocess.PIPE, env={**os.environ, **mark})
        for mark in ({MARK: str(folder)}, {MARK: f"{folder}2"}, {})
    )
    # A number in the record that has become another process's.
    recorded(tmp_path / "records", folder=str(folder), nodes={"head": machines.processes.of(nobodys.pid)})
    assert down("p", tmp_path / "records") is True
    try:
        assert (ours.wait(60), other.poll(), nobodys.poll()) == (-9, None, None)
        assert not folder.exists()
        assert not (tmp_path / "records" / "p.json").exists()
    finally:
        for process in (other, nobodys):
            process.kill()
            process.wait()
            process.stdin.close()
        ours.stdin.close()


@pytest.mark.parametrize("place", ["kuberay", "address"])
def test_clusters_that_others_start_are_refused_with_what_to_do(tmp_path, place, capsys):
    from pipelines.__main__ import main

    path = tmp_path / "p.yaml"
    address = "address: ray:6379" if place == "address" else "namespace: lab"
    path.write_text(f"name: p\nplace: {place}\n{address}\nhead: {{cpus: 1, memory_gib: 1}}\n")
    fixes = {"up": "lfm cluster render", "down": "kubectl delete", "status": "kubectl get raycluster p --namespace lab"}
    for action, fix in fixes.items():
        if place == "address" and action == "status":
            continue
        assert main(["cluster", action, str(path)]) == 2
        said = capsys.readouterr().err
        assert f"lfm cluster {action}: the profile's place is {place!r}, expected another one." in said
        assert place == "address" or fix in said


def counted(now):
    """How many nodes of each group live."""
    return {name: group["alive"] for name, group in now.get("groups", {}).items()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_outlives_its_command_is_brought_back_where_it_died_and_goes_without_a_trace(tmp_path):
    with cluster_up(tmp_path) as typed:
        record = Record(**typed.record())
        token = (typed.records / "trial.token").read_text()
        assert record.lives("head")
        assert record.lives("cpu-1")
        again = typed.data("cluster", "up", str(typed.profile))
        assert (again["address"], again["started"]) == (record.address, [])

        os.kill(record.nodes["cpu-1"]["pid"], 9)
        assert typed.data("cluster", "up", str(typed.profile))["started"] == ["cpu-1"]
        now, until = {}, time.monotonic() + 120
        while counted(now) != {"head": 1, "cpu": 1} and time.monotonic() < until:  # Ray has to miss the one that died
            now = typed.data("cluster", "status", str(typed.profile))
        assert counted(now) == {"head": 1, "cpu": 1}
        assert now["hours"] > 0
        assert now["cost"] == pytest.approx(now["groups"]["head"]["hours"] + 2 * now["groups"]["cpu"]["hours"])
        assert now["cost_per_hour"] == 3.0
        assert "no job runs" in typed("cluster", "status", str(typed.profile))[1]

        code, _, said = typed("cluster", "down", str(typed.profile))
        assert (code, "expected --yes" in said) == (2, True), "there is no terminal"
        refused = subprocess.run(
            [sys.executable, "-m", "cluster.look", record.address],
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"},
            capture_output=True,
            text=True,
        )
        assert refused.returncode != 0, "who has another token learns nothing"

        code, said, _ = typed("cluster", "down", str(typed.profile), "--yes", "--when-idle")
        assert (code, said) == (0, "cluster trial is down\n")
        assert marked(record.folder) == []
        assert not Path(record.folder).exists()
        assert typed("cluster", "down", str(typed.profile), "--yes")[1] == "cluster trial was not up\n"
        assert typed("cluster", "status", str(typed.profile))[0] == 1
        assert token not in json.dumps(record.nodes) + said


def test_no_profile_is_an_error_that_says_so(tmp_path):
    code, _, said = Typed(tmp_path)("cluster", "up")
    assert (code, "no such file" in said) == (2, True)
