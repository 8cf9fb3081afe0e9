"""What is found, refused and remembered about inputs."""

import os

import pytest

from operators.artifact import Adapter, Dataset, Delta, Editor, Memory, Model, Statistics
from pipelines.inputs.inspector import Looks
from pipelines.inputs.model_files import needed
from pipelines.plan import InputProblem
from pipelines.storage import digests
from pipelines.storage.local import LocalStorage
from pipelines.store import Store


@pytest.fixture
def looks(tmp_path):
    return Looks(tmp_path / "memory.sqlite", Store(LocalStorage(tmp_path / "store")))


def aged(path, seconds=60):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - seconds * 10**9))


def test_a_folder_is_known_by_what_is_in_it(looks, tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a")
    first = looks.pin(Dataset(str(folder)))
    (folder / ".hidden").write_text("not looked at")
    assert looks.pin(Dataset(str(folder))) == first
    (folder / "sub" / "a.txt").write_text("b")
    assert looks.pin(Dataset(str(folder))).digest != first.digest


def test_a_settled_file_is_hashed_once_and_a_fresh_one_again(looks, tmp_path, monkeypatch):
    path = tmp_path / "data.txt"
    path.write_text("a")
    seen = []
    looks.hashing = lambda path, size: seen.append(size)
    looks.pin(Dataset(str(path)))
    looks.pin(Dataset(str(path)))
    assert seen == [1, 1], "a file that changed just now may change again unseen"
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    looks.pin(Dataset(str(path)))
    looks.pin(Dataset(str(path)))
    assert seen == [1, 1, 1]
    aged(path)
    looks.pin(Dataset(str(path)))
    assert seen == [1, 1, 1, 1]


def test_without_hashing_a_local_input_has_no_digest(looks, tmp_path):
    (tmp_path / "x").write_text("x")
    looks.hash = False
    assert looks.pin(Dataset(str(tmp_path / "x"))).digest == ""
    assert looks.pin(Dataset("python://text")).digest


def test_what_is_not_there_empty_or_of_no_known_scheme_is_refused(looks, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_text("")
    for uri, said in (
        (str(tmp_path / "gone"), "is not there"),
        (str(tmp_path / "empty"), "is empty"),
        (str(tmp_path / "blank"), "is empty"),
        ("ftp://x/y", "has the scheme 'ftp'"),
    ):
        with pytest.raises(InputProblem, match=said):
            looks.check(Dataset(uri))


def folder_of(path, *names):
    path.mkdir()
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text('{"weight_map": {}}' if name.endswith(".index.json") else "{}")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        (Model, ["config.json", "pytorch_model.bin"], "holds weights only as pickles (pytorch_model.bin)"),
        (Model, ["config.json", "original/model.safetensors"], "holds no weights, expected model.safetensors"),
        (Model, ["config.json", "model.safetensors.index.json"], "holds no weights"),
        (Model, ["model.safetensors"], "has no config.json"),
        (Model, ["adapter_config.json", "adapter_model.safetensors"], "has no config.json"),
        (Adapter, ["adapter_config.json", "adapter_model.bin"], "holds weights only as pickles (adapter_model.bin)"),
        (Adapter, ["config.json", "model.safetensors"], "has no adapter_config.json"),
        (Delta, ["config.json", "model.safetensors"], "has no delta.json. Give a folder as lfm writes it (delta)"),
        (Delta, ["delta.json", "delta.pt"], "holds weights only as pickles (delta.pt)"),
        (Statistics, ["statistics.json"], "holds no weights, expected statistics.safetensors"),
        (Memory, ["editor.json", "editor.safetensors"], "has no memory.json"),
    ],
)
def test_a_folder_that_is_no_model_or_adapter_in_safetensors_is_refused(looks, tmp_path, kind, names, said):
    uri = folder_of(tmp_path / "m", *names)
    with pytest.raises(InputProblem) as refused:
        looks.check(kind(uri))
    assert said in str(refused.value)
    assert looks.check(Dataset(uri)).uri == uri


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Model, ["config.json", "model.safetensors", "pytorch_model.bin"]),
        (Model, ["lfm.json", "model.safetensors"]),
        (Model, ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]),
        (Adapter, ["adapter_config.json", "adapter_model.safetensors"]),
        (Delta, ["delta.json", "delta.safetensors", "facts.jsonl"]),
        (Statistics, ["statistics.json", "statistics.safetensors"]),
        (Editor, ["editor.json", "editor.safetensors"]),
        (Memory, ["memory.json", "memory.safetensors"]),
    ],
)
def test_a_folder_that_is_one_is_taken(looks, tmp_path, kind, names):
    uri = folder_of(tmp_path / "m", *names)
    assert looks.check(kind(uri)) == kind(uri)


def test_a_file_beside_the_tensors_that_is_damaged_is_refused(looks, tmp_path):
    uri = folder_of(tmp_path / "m", "delta.json", "delta.safetensors")
    (tmp_path / "m" / "delta.json").write_text("[]")
    with pytest.raises(InputProblem, match=r"holds a delta\.json that is no JSON object"):
        looks.check(Delta(uri))


def test_of_a_model_elsewhere_its_facts_are_fetched_too():
    names = ["config.json", "model.safetensors", "facts.jsonl", "other.jsonl", "pytorch_model.bin"]
    assert needed(Model, names) == ["model.safetensors", "config.json", "facts.jsonl"]


def test_a_file_is_no_model(looks, tmp_path):
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(InputProblem, match=r"has no config.json. Give a folder as save_pretrained writes it \(model\)"):
        looks.check(Model(str(tmp_path / "model.safetensors")))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_model_whose_configs_are_damaged_is_refused_by_the_file(looks, tmp_path, name, content):
    uri = folder_of(tmp_path / "m", "config.json", "model.safetensors", name)
    (tmp_path / "m" / name).write_text(content)
    with pytest.raises(InputProblem, match=f"holds a {name} that is no JSON object. Save the folder again"):
        looks.check(Model(uri))


@pytest.mark.parametrize("uri", ["x" * 5000, "~nobody-of-this-name/model"])
def test_a_path_that_the_system_does_not_take_is_refused(looks, uri):
    with pytest.raises(InputProblem, match=r"cannot be looked at \(.+\)\. Check the path and who may read it\."):
        looks.check(Dataset(uri))
