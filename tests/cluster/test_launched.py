"""A cluster on a cloud, through Ray's own launcher and a cloud that is a file."""

import json

import pytest

from cluster import launched
from pipelines.__main__ import main
from tests.cluster.cloud import ANSWER, FILE, machines

PROFILE = """
name: mine
place: aws
region: eu-west-1
image: registry.example.com/lfm:1
storage: s3://bucket/lfm
token: file:{folder}/token
head: {{cpus: 4, memory_gib: 16, type: m7i.xlarge, price_per_hour: 0.5}}
groups:
  gpu: {{cpus: 8, memory_gib: 32, gpus: 1, accelerator: L4, type: g6.2xlarge, price_per_hour: 2.0, max_nodes: 4}}
"""
OTHERS = {"another": {"tags": {"ray-cluster-name": "another", "ray-node-type": "head"}, "told": []}}
NODE = {"id": "1", "name": "n", "market": "", "alive": True, "began": 0.0, "ended": 0.0, "cpus": 0, "gpus": 0}


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """A profile's file; its machines are those of a cloud that is a file."""
    real = launched.document
    cloud = {"provider": {"type": "external", "module": "tests.cluster.cloud.Cloud"}}
    monkeypatch.setattr(launched, "document", lambda asked: {**real(asked), **cloud})
    for variable, name, told in ((FILE, "cloud.json", OTHERS), (ANSWER, "answer.json", {})):
        (tmp_path / name).write_text(json.dumps(told))
        monkeypatch.setenv(variable, str(tmp_path / name))
    (tmp_path / "token").write_text("s3cr3t")
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE.format(folder=tmp_path))
    return path


@pytest.mark.slow
def test_a_head_is_started_once_asked_and_ended_with_all_that_carries_its_name_alone(profile, capfd):
    def typed(*words):
        code = main(["cluster", words[0], str(profile), *words[1:]])
        return code, capfd.readouterr()

    assert typed("status")[0] == 1
    assert typed("up")[0] == 0
    mine = {k: v for k, v in machines().items() if k != "another"}
    ((name, head),) = mine.items()
    assert head["tags"]["ray-cluster-name"] == "mine"
    assert head["config"]["InstanceType"] == "m7i.xlarge"
    starts = [t for t in head["told"] if "ray start" in t]
    assert len(starts) == 1
    assert "RAY_AUTH_MODE=token" in starts[0]
    assert "s3cr3t" not in json.dumps(machines()), "the token goes as a file"

    assert typed("up")[0] == 0
    assert {*machines()} == {name, "another"}
    assert [t for t in machines()[name]["told"] if "ray start" in t] == starts, "what runs there goes on"

    nodes = [{**NODE, "group": "head", "idle_s": 99.0}, {**NODE, "group": "gpu", "idle_s": 99.0, "began": 1800.0}]
    answer = profile.parent / "answer.json"
    answer.write_text(json.dumps({"time": 3600.0, "nodes": nodes, "jobs": []}))
    code, (said, _) = typed("status", "--json")
    now = json.loads(said)
    assert (code, now["groups"]["gpu"]["alive"], now["cost"]) == (0, 1, 0.5 + 0.5 * 2.0)

    assert typed("down")[0] == 2, "there is nobody to ask"
    assert {*machines()} == {name, "another"}
    assert typed("down", "--yes", "--when-idle")[0] == 0
    assert machines() == OTHERS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("image: registry.example.com/lfm:1", "profile: image='', expected the container that everything runs in"),
        ("storage: s3://bucket/lfm", "profile: storage='', expected s3://BUCKET/PREFIX"),
    ],
)
def test_what_the_launcher_has_to_know_is_asked_for_before_anything_starts(profile, line, said, capsys):
    profile.write_text(profile.read_text().replace(line, ""))
    for action in ("up", "down", "status"):
        assert main(["cluster", action, str(profile), *(["--yes"] if action == "down" else [])]) == 2
        assert said in capsys.readouterr().err
