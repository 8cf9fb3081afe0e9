"""Inputs from S3."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lfm.weights import Header, Weights
from operators.artifact import Adapter, Dataset, Model
from operators.data.rows import columns_of
from pipelines.inputs.inspector import InputChanged, Looks, fetch
from pipelines.plan import InputProblem
from pipelines.storage import s3_client


@pytest.fixture
def put(bucket):
    """Writes objects into the bucket, and gives the URI of one."""

    def put_(*keys, data=b"data"):
        for key in keys:
            s3_client.client().put_object(Bucket=bucket, Key=key, Body=data)
        return f"s3://{bucket}/{keys[0]}"

    return put_


@pytest.fixture
def looks(bucket, store, tmp_path):
    return Looks(tmp_path / "memory.sqlite", store)


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_an_object_and_a_folder_are_fetched_as_they_are(looks, put, bucket):
    one = put("data/train/a.jsonl")
    put("data/train/deep/b.jsonl", "data/train/.hidden", "data/trainer.jsonl", data=b"other")
    alone = fetch(looks.pin(Dataset(one)))
    assert alone.path.name == "a.jsonl"
    assert alone.path.read_bytes() == b"data"
    folder = fetch(looks.pin(Dataset(f"s3://{bucket}/data/train/")))
    assert names(folder.path) == ["a.jsonl", "deep/b.jsonl"]
    assert fetch(looks.pin(Dataset(f"s3://{bucket}/data/train"))) == fetch(
        looks.pin(Dataset(f"s3://{bucket}/data/train"))
    )


def test_a_plan_sees_headers_and_the_first_rows_and_fetches_nothing_else(looks, put, bucket, monkeypatch):
    monkeypatch.setattr(s3_client, "download", None)
    put("m/config.json", data=b"{}")
    put("m/model.safetensors", data=safetensors.torch.save({"a": torch.ones(1 << 20)}))
    model = looks.check(Model(f"s3://{bucket}/m"))
    assert Weights(model.path).headers == {"a": Header((1 << 20,), torch.float32)}
    assert not Weights(model.path).read("a")[1 << 19 :].any()
    rows = put("rows.jsonl", data=b'{"text": "a row"}\n' * (1 << 16))
    for uri in (rows, put("folder/rows.jsonl", data=b'{"text": "a row"}').removesuffix("/rows.jsonl")):
        assert columns_of(looks.check(Dataset(uri)).path) == ("text",)
    assert looks.check(Dataset(rows)).path.name == "rows.jsonl"


@pytest.mark.parametrize("name", ["../out.jsonl", "deep/../../out.jsonl"])
def test_a_name_that_leads_out_of_its_folder_is_no_part_of_it(looks, put, bucket, tmp_path, name):
    put("folder/in.jsonl", f"folder/{name}", data=b'{"text": "a row"}')
    data = Dataset(f"s3://{bucket}/folder")
    assert names(looks.check(data).path) == ["in.jsonl"]
    assert names(fetch(looks.pin(data)).path) == ["in.jsonl"]
    assert not list(tmp_path.rglob("out.jsonl"))


def test_what_changes_while_a_plan_looks_is_named(looks, put, monkeypatch):
    uri = put("rows.jsonl", data=b'{"text": "a row"}')
    listed = s3_client.listed
    monkeypatch.setattr(s3_client, "listed", lambda *asked: (replace(o, etag="other") for o in listed(*asked)))
    with pytest.raises(InputProblem, match=r"rows.jsonl' could not be looked at \(.*PreconditionFailed"):
        looks.check(Dataset(uri))


def test_the_digest_changes_with_bytes_and_names_and_not_with_the_place(looks, put):
    first = looks.pin(Dataset(put("a/x.jsonl").removesuffix("/x.jsonl"))).digest
    assert len(first) == 64
    assert looks.pin(Dataset(put("b/x.jsonl").removesuffix("/x.jsonl"))).digest == first
    assert looks.pin(Dataset(put("c/y.jsonl").removesuffix("/y.jsonl"))).digest != first
    assert looks.pin(Dataset(put("a/x.jsonl", data=b"date").removesuffix("/x.jsonl"))).digest != first


def test_of_a_single_object_s_name_only_the_ending_counts(looks, put):
    one, same, other = (looks.pin(Dataset(put(name))) for name in ("a/x.jsonl", "b/y.jsonl", "a/x.json"))
    assert one.digest == same.digest != other.digest
    for pinned in (one, same, other):
        assert fetch(pinned).path.read_bytes() == b"data"
        assert fetch(pinned).path.suffix == Path(pinned.uri).suffix


def test_what_changed_after_the_plan_is_not_fetched(looks, put):
    pinned = looks.pin(Dataset(put("x.jsonl")))
    assert fetch(pinned).path.read_bytes() == b"data"
    put("x.jsonl", data=b"DATA")
    with pytest.raises(InputChanged, match=r"x.jsonl': changed after the run was planned"):
        fetch(pinned)


def test_what_changes_while_it_is_fetched_is_not_taken(looks, put, monkeypatch):
    pinned = looks.pin(Dataset(put("x.jsonl")))
    plain = s3_client.download

    def late(bucket, key, to):
        put("x.jsonl", data=b"DATA")
        plain(bucket, key, to)

    monkeypatch.setattr(s3_client, "download", late)
    with pytest.raises(InputChanged):
        fetch(pinned)


def test_it_is_transferred_once(looks, put, monkeypatch):
    pinned = looks.pin(Dataset(put("x.jsonl")))
    first = fetch(pinned)
    monkeypatch.setattr(s3_client, "download", None)
    assert fetch(pinned) == first


def test_of_a_model_only_what_it_needs_is_fetched_and_counts(looks, put, bucket):
    put("m/config.json", "m/model.safetensors", "m/pytorch_model.bin", "m/tokenizer.json", "m/original/x.safetensors")
    pinned = looks.pin(Model(f"s3://{bucket}/m"))
    assert names(fetch(pinned).path) == ["config.json", "model.safetensors", "tokenizer.json"]
    put("m/README.md")
    assert looks.pin(Model(f"s3://{bucket}/m")) == pinned


def test_what_is_not_there_empty_or_no_model_is_refused(looks, put, bucket, monkeypatch):
    put("blank", data=b"")
    put("old/config.json", "old/pytorch_model.bin")
    put("a/adapter_config.json", "a/adapter_model.safetensors", data=b"[]")
    for artifact, said in (
        (Dataset(f"s3://{bucket}/gone"), "is not there"),
        (Dataset(f"s3://{bucket}/blank"), "is empty"),
        (Model(f"s3://{bucket}/old"), "holds weights only as pickles"),
        (Model(f"s3://{bucket}/a"), "has no config.json"),
        (Adapter(f"s3://{bucket}/a"), "holds a adapter_config.json that is no JSON object"),
        (
            Dataset("s3://nobody-s-bucket/x"),
            "could not be looked at (the specified bucket does not exist",
        ),
    ):
        with pytest.raises(InputProblem) as refused:
            looks.check(artifact)
        assert said in str(refused.value)
