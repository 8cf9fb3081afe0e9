"""A pipeline whose store is on S3, from planning to its logs."""

import json

import pytest

from pipelines.__main__ import main
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Journal, history, states
from pipelines.plan import plan
from pipelines.run import run
from pipelines.storage.opening import open_storage
from pipelines.store import Store

pytestmark = pytest.mark.ray


def start(project, store, connect, tmp_path, name, *changes):
    spec, catalog = project.spec(*changes)
    made = plan(spec, Looks(tmp_path / "inputs.sqlite", store), catalog)
    journal = Journal.claim(store.storage, name)
    said = run(made, store, journal, connect=connect)
    return said, states(history(store.storage, name), made.steps)


def unreachable():
    raise AssertionError("a run that is stored has no use for Ray")


def test_a_pipeline_runs_on_s3_and_its_second_run_starts_no_ray(project, s3_store, ray_local, tmp_path, monkeypatch):
    said, steps = start(project, s3_store, ray_local, tmp_path, "one")
    assert said == "done"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    there = Store(open_storage(s3_store.storage.uri))
    made = there.get(steps["d"].data["digest"])
    assert (made.path / "data.txt").read_text() == "xxxx"
    log = there.storage.read(steps["d"].data["log"]).decode()
    assert log == "noop says hello\nand so does its child\n"

    said, again = start(project, there, unreachable, tmp_path, "two")
    assert said == "done"
    assert {n: s.state for n, s in again.items()} == dict.fromkeys("abcd", "reused")


def test_a_failure_on_s3_leaves_its_log_there(project, s3_store, ray_local, tmp_path):
    said, steps = start(project, s3_store, ray_local, tmp_path, "one", "b.fail=raise")
    assert said == "failed"
    log = s3_store.storage.read(steps["b"].data["log"]).decode()
    assert log.splitlines()[-1] == "Step 'b' failed with ValueError: asked to fail"


def test_the_command_line_takes_s3_as_a_store_and_as_an_input(project, bucket, monkeypatch, capsys):
    from pipelines.storage import s3_client

    monkeypatch.chdir(project.folder)
    s3_client.client().put_object(Bucket=bucket, Key="data/text.txt", Body=b"text on S3")
    words = ("diamond.yaml", "--store", f"s3://{bucket}/store", "--set", f"text=s3://{bucket}/data/text.txt", "--json")
    assert main(["plan", *words]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["inputs"]["text"]["uri"] == f"s3://{bucket}/data/text.txt"
    assert {s["state"] for s in planned["steps"].values()} == {"runs"}
    s3_client.client().delete_object(Bucket=bucket, Key="data/text.txt")
    assert main(["plan", *words]) == 2
    assert f"input 'text': 's3://{bucket}/data/text.txt' is not there" in capsys.readouterr().err
