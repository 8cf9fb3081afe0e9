"""Inputs from a hub, here one on loopback that answers as the real one does."""

import contextlib
import functools
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from lfm.weights import Header, Weights
from operators.artifact import Adapter, Dataset, Model
from operators.data.rows import columns_of
from pipelines.inputs import outlines
from pipelines.inputs.inspector import Looks, fetch
from pipelines.inputs.outlines import FIRST
from pipelines.plan import InputProblem
from pipelines.storage.base import cache

SHA = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "some/model": [
        "README.md", ".gitattributes", "config.json", "generation_config.json", "tokenizer.json", "merges.txt",
        "tokenizer.model", "chat_template.jinja", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "consolidated.safetensors", "consolidated.safetensors.index.json",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "original/consolidated.00.pth",
        "original/model.safetensors", "onnx/model.onnx", "modeling_own.py",
    ],
    "old/model": ["config.json", "pytorch_model.bin"],
    "no/weights": ["config.json", "README.md"],
    "no/config": ["model.safetensors"],
    "closed/model": ["config.json", "model.safetensors"],
    "some/adapter": ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "training_args.bin"],
    "some/data": ["data/train.parquet", "README.md", "cache.pkl"],
    "some/lines": ["rows.jsonl"],
    "some/array": ["rows.json"],
    "bad/config": ["config.json", "model.safetensors"],
}  # fmt: skip
GATED = {"closed/model"}


@functools.cache
def content(file):
    """A file as it could be on the hub; longer than what is asked for at once where only a part of it matters."""
    many = 1 << 16
    if file.endswith("model-00001-of-00002.safetensors"):
        return safetensors.torch.save({"a": torch.ones(3, 1 << 18)})
    if file.endswith("model-00002-of-00002.safetensors"):
        return safetensors.torch.save({"b": torch.ones(2, dtype=torch.int8)})
    if file.endswith("model.safetensors.index.json"):
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        return json.dumps({"weight_map": names}).encode()
    if file.endswith(".safetensors"):
        return safetensors.torch.save({"a": torch.ones(2, 2)}, metadata={"long": "x" * FIRST})
    if file.endswith(".parquet"):
        numbers = pa.array(np.random.default_rng(0).random(many))  # which no compression makes small
        table = pa.table({"prompt": numbers.cast(pa.string()), "completion": ["b"] * many})
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({"long": "x" * FIRST}), sink)
        return sink.getvalue().to_pybytes()
    if file == "rows.jsonl":
        return b'{"text": "a row"}\n' * many
    if file == "rows.json":
        return b"[" + b'{"text": "a row"},' * many + b'{"text": "the last"}]'
    return b"{}" if file.endswith(".json") else f"content of {file}".encode()


class Hub(BaseHTTPRequestHandler):
    """Metadata, listings and files; what is gated only for the token that may read it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        asked = re.fullmatch(r"/(?:api/(?:models|datasets)/)?(?:datasets/)?(\w+/\w+)(.*)", self.path.partition("?")[0])
        name, rest = asked.groups() if asked else ("", "")
        if name not in REPOSITORIES:
            return self.refuse(404, "RepoNotFound")
        allowed = name not in GATED or self.headers.get("Authorization") == "Bearer mine"
        if not allowed and rest and not rest.startswith("/revision"):
            return self.refuse(403, "GatedRepo")
        if rest == "/revision/gone":
            return self.refuse(404, "RevisionNotFound")
        if rest.startswith("/resolve/"):
            file = rest.rpartition(SHA)[2].removeprefix("/")
            return self.send(b"[]" if (name, file) == ("bad/config", "config.json") else content(file))
        files = [{"rfilename": f, "size": len(content(f))} for f in REPOSITORIES[name]]
        if rest.startswith("/tree/"):
            files = [{"type": "file", "path": f, "size": 1, "oid": f} for f in REPOSITORIES[name]]
            return self.answer(json.dumps(files).encode())
        gated = "manual" if name in GATED else False
        about = {"id": name, "sha": SHA, "siblings": files, "gated": gated, "private": False, "tags": []}
        return self.answer(json.dumps(about).encode())

    do_HEAD = do_GET  # noqa: N815

    def send(self, data):
        """A file, or the part of it that is asked for."""
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part is None or not self.server.knows_ranges:
            return self.answer(data)
        self.server.parts += 1
        return self.answer(data[int(part[1]) : int(part[2]) + 1], 206)

    def answer(self, data, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hash(data)}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # who asked may have seen enough
                self.wfile.write(data)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *said):
        pass


@pytest.fixture(scope="module")
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.knows_ranges, made.parts = True, 0
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def looks(server, store, tmp_path, monkeypatch):
    at = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", at)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", at + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return Looks(tmp_path / "memory.sqlite", store)


def fetched(looks, artifact):
    folder = fetch(looks.pin(artifact)).path
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_name_is_pinned_to_its_commit(looks):
    for uri in ("hf://some/model", "hf://some/model@main"):
        pinned = looks.pin(Model(uri))
        assert (pinned.uri, pinned.digest) == (f"hf://some/model@{SHA}", SHA)


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_plan_sees_headers_configs_and_the_first_rows_and_fetches_nothing_else(looks, server, knows_ranges):
    server.knows_ranges = knows_ranges
    model = looks.check(Model("hf://some/model"))
    assert Weights(model.path).headers == {"a": Header((3, 1 << 18), torch.float32), "b": Header((2,), torch.int8)}
    assert (model.path / "tokenizer.json").read_bytes() == content("tokenizer.json")
    with_values = (model.path / "model-00001-of-00002.safetensors").stat()
    assert with_values.st_size == len(content("model-00001-of-00002.safetensors")) > with_values.st_blocks * 512
    adapter = looks.check(Adapter("hf://some/adapter"))
    assert Weights(adapter.path, "adapter_model").headers.keys() == {"a"}
    data = looks.check(Dataset("hf://some/data"))
    assert columns_of(data.path) == ("prompt", "completion")
    lines = looks.check(Dataset("hf://some/lines"))
    assert columns_of(lines.path) == ("text",)
    assert 0 < (lines.path / "rows.jsonl").stat().st_size < len(content("rows.jsonl"))
    seen = server.parts
    assert looks.check(Model("hf://some/model")) == model
    assert server.parts == seen


def test_of_data_whose_rows_only_a_large_file_tells_a_plan_sees_nothing(looks, monkeypatch):
    assert columns_of(looks.check(Dataset("hf://some/array")).path) == ("text",)
    shutil.rmtree(cache())
    monkeypatch.setattr(outlines, "WHOLE", len(content("rows.json")) - 1)
    assert looks.check(Dataset("hf://some/array")) is None


def test_a_config_that_is_no_json_is_refused_before_weights_are_fetched(looks):
    with pytest.raises(InputProblem, match=r"'hf://bad/config' holds a config.json that is no JSON object"):
        looks.check(Model("hf://bad/config"))


def test_of_a_model_its_weights_come_once_with_config_and_tokenizer(looks):
    assert fetched(looks, Model("hf://some/model")) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]


def test_of_an_adapter_and_of_data_no_pickle_comes(looks):
    assert fetched(looks, Adapter("hf://some/adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert fetched(looks, Dataset("hf://some/data")) == ["README.md", "data/train.parquet"]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("hf://old/model", "holds weights only as pickles (pytorch_model.bin), which are never opened,"),
        ("hf://no/weights", "holds no weights, expected model.safetensors"),
        ("hf://no/config", "has no config.json"),
        ("hf://not/there", "is not on the hub, or is private. Check the name; for a private or gated one set HF_TOK"),
        ("hf://some/model@gone", "has no such revision"),
        ("hf://closed/model", "is gated, and the hub does not let this account read it. Ask for access on its page,"),
        ("hf://a/b/c", "could not be looked up"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_fetched(looks, uri, said):
    with pytest.raises(InputProblem) as refused:
        looks.pin(Model(uri))
    assert str(refused.value).startswith(f"{uri!r} {said}")


def test_a_gated_model_comes_for_the_token_that_may_read_it(looks, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert fetched(looks, Model("hf://closed/model")) == ["config.json", "model.safetensors"]
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(InputProblem, match="is gated, and the hub does not let this account read it"):
        fetch(Model(f"hf://closed/model@{SHA}", SHA))


def test_a_hub_that_does_not_answer_is_named(looks, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputProblem, match=r"could not be looked up \(.*refused.*HF_ENDPOINT"):
        looks.pin(Model("hf://some/model"))
