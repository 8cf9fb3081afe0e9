"""Profiles are read like pipelines: all that is wrong at once, each with its line."""

from pathlib import Path

import pytest

from operators.artifact import Dataset, Model
from pipelines.problems import SpecError
from pipelines.profiles import read_profile, unreadable

WHOLE = """\
name: research
place: kuberay
storage: s3://bucket/lfm
mlflow: http://mlflow:5000
shared: [/nfs]
token: secret:ray-token
head: {cpus: 4, memory_gib: 16, price_per_hour: 0.2}
groups:
  cpu: {cpus: 16, memory_gib: 64, max_nodes: 4}
  h100:
    cpus: 24
    memory_gib: 200
    gpus: 1
    accelerator: H100
    max_nodes: 8
"""


def written(tmp_path, text):
    file = Path(tmp_path) / "p.yaml"
    file.write_text(text)
    return str(file)


def refused(tmp_path, text):
    with pytest.raises(SpecError) as error:
        read_profile(written(tmp_path, text))
    return error.value.problems


def test_a_profile_is_read(tmp_path):
    made = read_profile(written(tmp_path, WHOLE))
    assert (made.name, made.place, made.shared) == ("research", "kuberay", ("/nfs",))
    assert (made.groups["h100"].accelerator, made.groups["h100"].max_nodes) == ("H100", 8)
    assert made.most_nodes == 13


def test_everything_that_is_wrong_is_said_at_once_with_its_line(tmp_path):
    text = WHOLE.replace("cpus: 24", "cpus: none").replace("max_nodes: 4", "max_node: 4").replace("name: r", "nam: r")
    assert refused(tmp_path, text) == (
        "p.yaml:1: profile has no field 'nam'. Did you mean 'name'?",
        "p.yaml:1: profile needs name.",
        "p.yaml:9: group 'cpu' has no field 'max_node'. Did you mean 'max_nodes' or 'min_nodes'?",
        "p.yaml:11: group 'h100': cpus='none', expected a number.",
    )


def test_what_holds_of_all_groups_together_is_said_too(tmp_path):
    text = WHOLE.replace("max_nodes: 8", "max_nodes: 8\n    market: spot\n    fallback: gpu")
    assert refused(tmp_path, text) == (
        "p.yaml:17: profile: groups.h100.fallback='gpu', expected an on-demand group: cpu.",
    )


@pytest.mark.parametrize("text", ["", "name", "- name: x"])
def test_what_is_no_profile_is_refused(tmp_path, text):
    (said,) = refused(tmp_path, text)
    assert "expected a mapping. 'lfm cluster init' writes one." in said


def test_a_file_that_is_not_there_is_answered_with_what_is_near(tmp_path):
    written(tmp_path, WHOLE)
    with pytest.raises(SpecError, match=r"no such file.*Did you mean '.*p.yaml'"):
        read_profile(str(tmp_path / "q.yaml"))


def test_what_other_machines_cannot_read_is_named(tmp_path):
    made = read_profile(written(tmp_path, WHOLE))
    inputs = {
        "model": Model("/nfs/model"),
        "base": Model("hf://base"),
        "text": Dataset("./text.jsonl"),
        "code": Dataset("python://stdlib"),
        "old": Model("lfm://last/merged"),
    }
    assert not list(unreadable(made, store="s3://b/p", mlflow="own", inputs={}))
    said = list(map(str, unreadable(made, store=".lfm", mlflow="http://localhost:5000", inputs=inputs)))
    where = "the 13 machines of profile 'research' cannot read"
    assert said == [
        f"storage: {where} '.lfm', expected s3://BUCKET/PREFIX, or a folder below 'shared', which every machine sees.",
        f"mlflow: {where} 'http://localhost:5000', expected a server that every machine reaches, 'own' or 'none'.",
        f"input 'text': {where} './text.jsonl', expected a URI such as s3://BUCKET/KEY or hf://NAME, or a path below "
        "'shared'.",
    ]
