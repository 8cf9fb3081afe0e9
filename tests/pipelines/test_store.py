"""Artifacts by content, results by fingerprint, on a local folder."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from operators.artifact import Dataset
from pipelines.storage import LocalStorage, StorageFailed, UnsupportedStorage, open_storage
from pipelines.store import MissingArtifact, Result, Store, UnsafeArtifact


def made(store, text="x", name="data.txt"):
    folder = store.storage.scratch()
    (folder / name).write_text(text)
    return store.put(folder, "dataset", {"n": 1})


def test_an_artifact_is_named_by_its_content(store):
    digest = made(store)
    assert made(store) == digest
    assert made(store, "y") != digest
    artifact = store.get(digest)
    assert isinstance(artifact, Dataset)
    assert (artifact.path / "data.txt").read_text() == "x"
    assert artifact.about == {"n": 1}
    assert not stat.S_IMODE((artifact.path / "data.txt").stat().st_mode) & 0o222


def test_a_single_file_is_put_as_a_folder(store):
    path = store.storage.scratch() / "deployment.json"
    path.write_text("{}")
    assert (store.get(store.put(path, "deployment", {})).path / "deployment.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["model.pkl", "pytorch_model.bin", "x.pt", "x.ckpt"])
def test_what_may_be_a_pickle_is_refused(store, name):
    with pytest.raises(UnsafeArtifact, match="may be a pickle"):
        made(store, name=name)


def test_a_link_is_refused(store, tmp_path):
    folder = store.storage.scratch()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(UnsafeArtifact, match="a link or a device"):
        store.put(folder, "dataset", {})


def damage(store, digest, how):
    path = store.get(digest).path / "data.txt"
    path.chmod(0o644)
    if how == "gone":
        path.unlink()
    else:
        path.write_text(how)


@pytest.mark.parametrize("how", ["gone", "longer than it was", ""])
def test_a_damaged_artifact_is_no_hit_and_is_made_good_by_the_next(store, how):
    digest = made(store)
    store.commit(Result(fingerprint="f", kind="dataset", digest=digest))
    assert store.hit("f").digest == digest
    damage(store, digest, how)
    assert store.hit("f") is None
    assert made(store) == digest
    assert store.hit("f").digest == digest
    assert os.listdir(store.storage.root / "quarantine")


def test_a_byte_that_flipped_is_seen_where_bytes_are_looked_at(store):
    digest = made(store)
    damage(store, digest, "y")
    assert store.whole(digest)
    assert not store.whole(digest, bytes_too=True)


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


def test_of_many_writers_of_one_key_one_wins(tmp_path):
    storage = LocalStorage(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: storage.put_if_absent("k", str(i).encode()), range(64)))
    assert sum(won) == 1
    assert storage.read("k") == str(won.index(True)).encode()


def test_of_many_who_replace_one_value_one_wins(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.put_if_absent("k", b"old")
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: storage.replace_if_match("k", str(i).encode(), b"old"), range(64)))
    assert sum(won) == 1
    assert storage.read("k") == str(won.index(True)).encode()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="Make room or give access"):
        open_storage(str(tmp_path / "file" / "store"))


def test_a_scheme_without_conditional_writes_is_refused():
    with pytest.raises(UnsupportedStorage, match="gs://bucket"):
        open_storage("gs://bucket/x")


def test_nothing_is_left_behind_in_scratch(store):
    digest = made(store)
    made(store)
    store.storage.put_if_absent("k", b"1")
    store.storage.put_if_absent("k", b"2")
    store.storage.delete(f"artifacts/{digest}")
    left = [p for p in (store.storage.root / "scratch").iterdir() if p.name.endswith(".part")]
    assert left == []
    assert not isinstance(store, type(None))
    assert Store(store.storage).whole(digest) is False
