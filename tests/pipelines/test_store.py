"""Artifacts by content, results by fingerprint, on every kind of storage."""

import stat

import pytest

from operators.artifact import Dataset
from pipelines.storage import s3_client
from pipelines.storage.base import UnsafePath
from pipelines.storage.digests import Digests
from pipelines.storage.local import LocalStorage
from pipelines.store import DamagedArtifact, MissingArtifact, Result, Store, UnsafeArtifact, canonical


@pytest.fixture
def store(either_store):
    return either_store


def made(store, text="x", name="data.txt"):
    folder = store.storage.scratch()
    (folder / name).write_text(text)
    return store.put(folder, "dataset", {"n": 1})


def damage(store, digest, how):
    """Change a file behind the store's back."""
    key = f"artifacts/{digest}/data.txt"
    if store.storage.uri.startswith("s3://"):
        bucket, prefix = s3_client.split(store.storage.uri)
        s3_client.client().delete_object(Bucket=bucket, Key=f"{prefix}/{key}")
        if how != "gone":
            s3_client.client().put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=how.encode())
        return
    path = store.storage.root / key
    path.unlink()
    if how != "gone":
        path.write_text(how)


def test_an_artifact_is_named_by_its_content(store):
    digest = made(store)
    assert made(store) == digest
    assert made(store, "y") != digest
    artifact = store.get(digest)
    assert isinstance(artifact, Dataset)
    assert (artifact.path / "data.txt").read_text() == "x"
    assert artifact.about == store.manifest(digest)["about"] == {"n": 1}
    assert not stat.S_IMODE((artifact.path / "data.txt").stat().st_mode) & 0o222


def test_a_single_file_is_put_as_a_folder(store):
    path = store.storage.scratch() / "deployment.json"
    path.write_text("{}")
    assert (store.get(store.put(path, "deployment", {})).path / "deployment.json").read_text() == "{}"


def flipped(path):
    path.chmod(0o644)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def test_bytes_that_changed_where_they_are_kept_put_the_artifact_in_quarantine(tmp_path):
    store = Store(LocalStorage(tmp_path / "store"))
    digest, digests = made(store), Digests(tmp_path / "memory.sqlite")
    flipped(store.verified(digest, digests).path / "data.txt")
    with pytest.raises(DamagedArtifact, match=f"artifact {digest[:12]}: 'data.txt' is not what was put in"):
        store.verified(digest, digests)
    with pytest.raises(MissingArtifact):
        store.get(digest)
    assert store.storage.list("quarantine")


def test_bytes_that_changed_in_a_copy_are_fetched_again_and_nothing_is_lost(s3_store, tmp_path):
    digest, digests = made(s3_store), Digests(tmp_path / "memory.sqlite")
    path = s3_store.verified(digest, digests).path / "data.txt"
    flipped(path)
    assert (s3_store.verified(digest, digests).path / "data.txt").read_text() == "x"
    assert s3_store.storage.list("quarantine") == ()


@pytest.mark.parametrize("name", ["../data.txt", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_that_names_what_lies_outside_is_refused(store, name):
    files = {name: {"sha256": "0" * 64, "size": 1}}
    manifest = canonical({"about": {}, "files": files, "kind": "dataset"})
    assert store.storage.put_if_absent("artifacts/d/manifest.json", manifest)
    with pytest.raises(UnsafePath, match="leads out of its folder, expected one below it"):
        store.get("d")


@pytest.mark.parametrize("name", ["model.pkl", "pytorch_model.bin", "x.pt", "x.ckpt"])
def test_what_may_be_a_pickle_is_refused(store, name):
    with pytest.raises(UnsafeArtifact, match="may be a pickle"):
        made(store, name=name)


def test_a_link_is_refused(store, tmp_path):
    folder = store.storage.scratch()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(UnsafeArtifact, match="a link or a device"):
        store.put(folder, "dataset", {})


@pytest.mark.parametrize("how", ["gone", "longer than it was", ""])
def test_a_damaged_artifact_is_no_hit_and_is_made_good_by_the_next(store, how):
    digest = made(store)
    store.commit(Result(fingerprint="f", kind="dataset", digest=digest))
    assert store.hit("f").digest == digest
    damage(store, digest, how)
    assert store.hit("f") is None
    assert made(store) == digest
    assert store.hit("f").digest == digest
    (kept,) = store.storage.folders("quarantine")
    assert kept.startswith(digest)


def test_a_byte_that_flipped_is_seen_where_bytes_are_looked_at(store, tmp_path, monkeypatch):
    digest = made(store)
    assert store.whole(digest, bytes_too=True)
    damage(store, digest, "y")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    fresh = type(store)(type(store.storage)(getattr(store.storage, "root", store.storage.uri)))
    assert fresh.whole(digest)
    assert not fresh.whole(digest, bytes_too=True)


def test_a_hit_is_looked_at_without_fetching_it(s3_store, tmp_path, monkeypatch):
    digest = made(s3_store)
    s3_store.commit(Result(fingerprint="f", kind="dataset", digest=digest))
    monkeypatch.setattr(s3_client, "download", None)
    monkeypatch.setattr(type(s3_store.storage), "fetch", None)
    assert s3_store.hit("f").digest == digest


def test_many_are_looked_up_at_once_as_one_by_one(store):
    for i in range(3):
        store.commit(Result(fingerprint=f"f{i}", kind="dataset", digest=made(store, str(i))))
    damage(store, store.result("f1").digest, "gone")
    asked = ["f2", "f0", "f1", "unknown", "f0"]
    assert store.hits(asked) == {f: store.hit(f) for f in asked if store.hit(f)}
    assert set(store.hits(asked)) == {"f0", "f2"}


def test_the_first_of_two_results_stays_unless_it_is_damaged(store):
    one, other = made(store, "one"), made(store, "other")
    assert store.commit(Result(fingerprint="f", kind="dataset", digest=one)).digest == one
    assert store.commit(Result(fingerprint="f", kind="dataset", digest=other)).digest == one
    damage(store, one, "gone")
    assert store.commit(Result(fingerprint="f", kind="dataset", digest=other)).digest == other
    assert store.hit("f").digest == other


def test_an_unknown_digest_is_an_error(store):
    with pytest.raises(MissingArtifact, match="is not in the store"):
        store.get("0" * 64)
