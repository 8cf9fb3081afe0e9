"""Passwords and tokens: URIs that hold one are refused, and what lies beside a run is in nothing that it writes."""

import contextlib
import os
from pathlib import Path

import pytest

from cluster.pool import Pool
from operators.artifact import Dataset
from pipelines.__main__ import main
from pipelines.credentials import masked
from pipelines.inputs.inspector import Looks
from pipelines.plan import InputProblem
from pipelines.storage import s3_client
from pipelines.storage.base import StorageFailed
from pipelines.tracking import mirror
from tests.conftest import CANARY, SECRETS

HIDDEN = [
    ("https://user:p@ss@host/x", "https://...@host/x"),
    ("http://token@host:5000", "http://...@host:5000"),
    ("postgresql+psycopg2://user:p/w@host/db", "postgresql+psycopg2://user:...@host/db"),
    ("postgresql://host/db?user=me&password=pw", "postgresql://host/db?user=me&password=..."),
    ("s3://AKIA:pw@bucket/key", "s3://AKIA:...@bucket/key"),
    ("no answer from http://a:b@c/d: refused", "no answer from http://...@c/d: refused"),
    ("https://cdn/x?X-Amz-Signature=abc&part=1", "https://cdn/x?X-Amz-Signature=...&part=1"),
]
PLAIN = [
    "http://host:5000/@x", "hf://org/name@main", "hf://name@main", "s3://bucket/a@b", "lfm://run/step", "./a:b@c",
    "postgresql://user@host/db", "sqlite:////home/me@x/m.db", "python://text", "https://host/x?version=1",
]  # fmt: skip


@pytest.mark.parametrize(("uri", "shown"), HIDDEN)
def test_passwords_and_tokens_in_uris_are_not_shown(uri, shown):
    assert masked(uri) == shown
    assert masked(shown) == shown


@pytest.mark.parametrize("uri", PLAIN)
def test_other_uris_are_shown_as_they_are(uri):
    assert masked(uri) == uri


@pytest.mark.parametrize("uri", ["s3://AKIA:pw@bucket/key", "https://user:pw@host/x"])
def test_an_input_whose_uri_holds_a_password_is_refused_before_anybody_is_asked(tmp_path, uri):
    with pytest.raises(InputProblem) as refused:
        Looks(tmp_path / "memory.sqlite", None).check(Dataset(uri))
    assert "holds a password or a token, which would be written down. Set AWS_ACCESS_KEY_ID" in str(refused.value)
    assert "pw" not in str(refused.value)


def test_a_command_whose_words_hold_a_password_says_so_and_does_nothing(project, monkeypatch, capsys):
    monkeypatch.chdir(project.folder)
    for words in (["--mlflow", "https://me:pw@host"], ["--store", "s3://AKIA:pw@b"], ["--set", "text=s3://A:pw@b/k"]):
        assert main(["run", "diamond.yaml", *words]) == 2
        said = capsys.readouterr()
        assert "holds a password or a token, which would be written down" in said.err
        assert "pw" not in said.out + said.err
    assert not Path(".lfm/runs").exists()


def test_an_endpoint_s_password_is_not_said(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:pw@127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(StorageFailed) as failed, s3_client.answered("s3://b"):
        s3_client.client(retries=1).list_objects_v2(Bucket="b")
    assert "http://...@127.0.0.1:1" in str(failed.value)


OWN = '''
"""Steps that use secrets as they should: they read them and say nothing."""

import os
from pathlib import Path

from operators.artifact import Model
from operators.base import operator
from operators.workspace import Workspace


@operator()
def made(work: Workspace) -> Model:
    """Make something with a token's help."""
    assert os.environ["HF_TOKEN"].startswith("canary-")
    print("made says hello")
    work.progress(1, 1, loss=0.5)
    (work.scratch / "m").mkdir()
    (work.scratch / "m" / "config.json").write_text('{"model_type": "none"}')
    (work.scratch / "m" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return work.save(Model, work.scratch / "m", {"base": ""})


@operator()
def fails(work: Workspace, *, model: Model) -> Model:
    """Fail where a secret is at hand."""
    token = os.environ["HF_TOKEN"]
    asked = {"token": token, **os.environ}
    return {}["no" if asked else token]
'''
PIPELINE = """
name: secrets
uses: [own.py]
steps:
  model: {operator: made}
  named: {operator: register, inputs: {model: model}, params: {name: helper}}
  broken: {operator: fails, inputs: {model: named}}
"""


@pytest.mark.ray
@pytest.mark.slow
def test_no_secret_of_the_environment_or_the_folder_is_in_anything_that_a_run_leaves(
    own, one_ray, tmp_path, monkeypatch, capfd
):
    """The workers have the secrets as well, and the process that tells MLflow."""
    import ray

    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in {"own.py": OWN, "secrets.yaml": PIPELINE, ".env": CANARY, "token": CANARY}.items():
        (folder / name).write_text(text)
    assert all(os.environ[name].startswith(CANARY) for name in SECRETS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(mirror, "GRACE_S", 300.0)
    monkeypatch.setattr("pipelines.commands.run.opened", lambda *_: contextlib.nullcontext(Pool()))
    there = ["--store", own.storage.uri]
    assert main(["run", "secrets.yaml", *there, "--mlflow", "own"]) == 1
    for words in (["show"], ["show", "--json"], ["show", "--html", "page.html"]):
        assert main([words[0], "last", *words[1:], *there]) == 0
    for words in (["logs", "last", "broken"], ["why", "last", "model"], ["lineage", "last/model"], ["ps"]):
        assert main([*words, *there]) == 0
    assert main(["export", "last/model", "out", *there]) == 0

    said = capfd.readouterr()
    assert "KeyError" in said.out, "the traceback was shown"
    assert own.open() == {}
    assert sorted(r["status"] for r in own.picture("secrets")["runs"]) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    written = [p for place in (Path(own.storage.uri), folder, session) for p in place.rglob("*") if p.is_file()]
    assert {p.relative_to(own.storage.uri).parts[0] for p in written if p.is_relative_to(own.storage.uri)} >= {
        "artifacts", "mlflow.db", "registry", "results", "runs",
    }  # fmt: skip
    holding = [p for p in written if CANARY.encode() in p.read_bytes()]
    assert sorted(holding) == [folder / ".env", folder / "token"]
    assert CANARY not in said.out + said.err
