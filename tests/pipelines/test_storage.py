"""What every storage promises, and what each does on its own."""

import hashlib
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import processes
from pipelines.storage import s3, s3_client
from pipelines.storage.base import (
    DamagedFolder,
    StorageFailed,
    UnsafePath,
    UnsupportedStorage,
    UnusableStore,
    copied,
    owner,
)
from pipelines.storage.local import LocalStorage
from pipelines.storage.opening import open_storage
from pipelines.storage.s3 import PART, S3Storage


@pytest.fixture
def storage(either_store):
    return either_store.storage


@pytest.fixture
def on_s3(s3_store):
    return s3_store.storage


def folder_of(storage, **files):
    """A folder in scratch with these files and a manifest that says what they are."""
    folder = storage.scratch()
    said = {}
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        said[path.relative_to(folder).as_posix()] = {"sha256": digest, "size": len(text)}
    (folder / "manifest.json").write_text(json.dumps({"files": said}))
    return folder


def texts(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*")
            if p.is_file() and p.name != "manifest.json"}  # fmt: skip


def test_what_was_put_is_read_and_what_was_not_is_none(storage):
    assert storage.read("a/b") is None
    assert storage.put_if_absent("a/b", b"one")
    assert not storage.put_if_absent("a/b", b"other")
    assert storage.read("a/b") == b"one"
    assert storage.read("a") is None
    assert storage.read("a/b/c") is None


def test_a_value_is_replaced_only_where_it_is_the_expected_one(storage):
    assert not storage.replace_if_match("k", b"new", b"")
    storage.put_if_absent("k", b"old")
    assert not storage.replace_if_match("k", b"new", b"other")
    assert storage.replace_if_match("k", b"new", b"old")
    assert storage.read("k") == b"new"


def test_a_folder_is_listed_with_all_below_it_and_nothing_beside_it(storage):
    for key in ("runs/b/2", "runs/a/deep/1", "runs/a/1", "runs-too/x", "top"):
        storage.put_if_absent(key, key.encode())
    storage.replace_if_match("runs/a/1", b"changed", b"runs/a/1")
    assert storage.list("runs") == ("runs/a/1", "runs/a/deep/1", "runs/b/2")
    assert storage.list("runs/a") == ("runs/a/1", "runs/a/deep/1")
    assert storage.list("nothing") == ()
    assert storage.list("runs", after="runs/a/1") == ("runs/a/deep/1", "runs/b/2")
    assert storage.list("runs", after="runs/a/2") == ("runs/a/deep/1", "runs/b/2")
    assert storage.list("runs", after="runs/b/2") == storage.list("runs/a", after="runs/b") == ()
    assert storage.folders("runs") == ("a", "b")
    assert {"runs", "runs-too"} <= set(storage.folders(""))
    assert storage.folders("runs/b") == storage.folders("nothing") == ()
    assert [(e.key, e.size) for e in storage.entries("runs/a")] == [("runs/a/1", 7), ("runs/a/deep/1", 13)]


def test_entries_know_when_they_were_written(storage):
    for key in ("a", "b"):
        storage.put_if_absent(f"e/{key}", b"")
    one, other = storage.entries("e")
    written = os.stat(storage.scratch()).st_mtime
    assert abs(one.modified - written) < 60
    assert one.modified <= other.modified


@pytest.mark.parametrize("verb", ["put", "replace"])
def test_of_many_writers_of_one_key_one_wins(storage, verb):
    def write(i):
        data = str(i).encode()
        return storage.put_if_absent("k", data) if verb == "put" else storage.replace_if_match("k", data, b"old")

    if verb == "replace":
        storage.put_if_absent("k", b"old")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(24)))
    assert sum(won) == 1
    assert storage.read("k") == str(won.index(True)).encode()


def test_a_folder_moves_in_whole_and_comes_back_read_only(storage):
    folder = folder_of(storage, a="1", sub__b="22")
    assert storage.adopt(folder, "things/x")
    assert not folder.exists()
    found = storage.fetch("things/x")
    assert texts(found) == {"a": "1", "sub/b": "22"}
    assert not any(stat.S_IMODE(p.stat().st_mode) & 0o222 for p in found.rglob("*") if p.is_file())
    assert storage.list("things") == ("things/x/a", "things/x/manifest.json", "things/x/sub/b")


def test_a_folder_that_is_there_stays(storage):
    storage.adopt(folder_of(storage, a="first"), "x")
    second = folder_of(storage, a="second")
    assert not storage.adopt(second, "x")
    assert texts(second) == {"a": "second"}
    assert texts(storage.fetch("x")) == {"a": "first"}


def test_what_is_discarded_or_deleted_is_gone_and_its_neighbours_are_not(storage):
    for key in ("f/x", "f/x2", "f/y"):
        storage.adopt(folder_of(storage, a=key), key)
    storage.put_if_absent("k", b"1")
    storage.put_if_absent("k2", b"2")
    storage.discard("f/x", "away/x")
    storage.delete("f/y")
    storage.delete("k")
    for absent in ("f/x", "nothing"):
        storage.discard(absent, "away/again")
        storage.delete(absent)
    assert storage.folders("f") == ("x2",)
    assert storage.folders("away") == ("x",)
    assert texts(storage.fetch("away/x")) == {"a": "f/x"}
    assert (storage.read("k"), storage.read("k2")) == (None, b"2")
    storage.adopt(folder_of(storage, a="new"), "f/x")
    assert texts(storage.fetch("f/x")) == {"a": "new"}


def test_appends_come_one_after_the_other(storage):
    pieces = [f"{i:05}|".encode() * (PART // 20) for i in range(10)]
    for i, piece in enumerate(pieces):
        storage.append("log/s.txt", piece)
        assert storage.read("log/s.txt") == b"".join(pieces[: i + 1])
    again = open_storage(storage.uri)
    again.append("log/s.txt", b"and later")
    whole = b"".join([*pieces, b"and later"])
    assert storage.read("log/s.txt") == whole
    (entry,) = storage.entries("log")
    assert (entry.key, entry.size) == ("log/s.txt", len(whole))
    assert storage.list("log") == ("log/s.txt",)
    assert storage.list("log", after="log/s.txt") == ()
    storage.delete("log/s.txt")
    assert storage.read("log/s.txt") is None
    assert storage.list("log") == ()


def test_an_append_sends_again_only_the_last_part(on_s3, bucket):
    sizes = []
    for _ in range(5):
        on_s3.append("log", b"x" * (PART // 2))
        sizes.append([o.size for o in s3_client.listed(bucket, "some/where/log")])
    half = PART // 2
    assert sizes == [[half], [2 * half], [2 * half, half], [2 * half, 2 * half], [2 * half, 2 * half, half]]


def test_scratch_says_whose_it_is(storage):
    one, other = storage.scratch(), storage.scratch()
    assert one != other
    assert list(one.iterdir()) == []
    assert one.parent == storage.scratches
    found = owner(one.name)
    assert processes.alive(found)
    assert found["pid"] == os.getpid()
    assert owner("3f2a") == {}


def test_nothing_is_left_in_scratch(storage):
    storage.put_if_absent("k", b"1")
    storage.put_if_absent("k", b"2")
    storage.replace_if_match("k", b"3", b"0")
    storage.adopt(folder_of(storage, a="1"), "x")
    storage.fetch("x")
    storage.delete("x")
    assert list(storage.scratches.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UnusableStore, match=r"not a directory, expected a location that can be written to\. Give another"
    ):
        open_storage(str(tmp_path / "file" / "store"))


@pytest.mark.parametrize("uri", ["gs://bucket/x", "hdfs://x", "s3:///x"])
def test_a_scheme_without_conditional_writes_is_refused(uri):
    with pytest.raises(UnsupportedStorage, match=rf"store '{uri}': expected a local folder or s3://bucket/prefix"):
        open_storage(uri)


def test_a_bucket_that_is_not_there_is_refused(on_s3):
    with pytest.raises(StorageFailed, match=r"s3://nobody/x/store.json: the specified bucket does not exist"):
        open_storage("s3://nobody/x")


def test_an_endpoint_that_does_not_answer_is_refused(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(s3, "PAUSES_S", ())
    with pytest.raises(StorageFailed, match="could not connect to the endpoint URL"):
        open_storage("s3://bucket/x")


def test_an_endpoint_that_writes_over_what_is_there_is_refused(bucket, monkeypatch):
    plain = S3Storage._put
    monkeypatch.setattr(S3Storage, "_put", lambda self, key, data, **condition: plain(self, key, data))
    with pytest.raises(StorageFailed, match="writes over what is there despite If-None-Match"):
        open_storage(f"s3://{bucket}/x")


@pytest.mark.parametrize("arrived", [True, False])
def test_an_answer_that_got_lost_is_settled_by_what_is_there(on_s3, monkeypatch, arrived):
    from botocore.exceptions import ConnectionClosedError

    calls = []
    once = s3_client.client(retries=1)

    class Losing:
        def put_object(self, **arguments):
            calls.append(arguments)
            if len(calls) > 1 or arrived:
                once.put_object(**arguments)
            if len(calls) == 1:
                raise ConnectionClosedError(endpoint_url="there")

    plain = s3_client.client
    monkeypatch.setattr(s3_client, "client", lambda *, retries=5: Losing() if retries == 1 else plain(retries=retries))
    monkeypatch.setattr(s3, "PAUSES_S", (0.0,))
    assert on_s3.put_if_absent("k", b"mine")
    assert len(calls) == 2
    assert on_s3.read("k") == b"mine"
    assert not on_s3.put_if_absent("k", b"mine")


def test_lists_go_over_all_pages(on_s3, monkeypatch):
    for i in range(5):
        on_s3.put_if_absent(f"p/{i}/x", b"")
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    assert on_s3.list("p") == tuple(f"p/{i}/x" for i in range(5))
    assert on_s3.folders("p") == tuple("01234")
    on_s3.delete("p")
    assert on_s3.list("p") == ()


def elsewhere(storage, monkeypatch, tmp_path):
    """The same storage as another machine sees it, and what that machine fetches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    fetched = []
    plain = s3_client.download

    def counted(bucket, key, to):
        fetched.append(key.rpartition("/")[2])
        plain(bucket, key, to)

    monkeypatch.setattr(s3_client, "download", counted)
    return open_storage(storage.uri), fetched


def test_a_machine_fetches_a_folder_once_and_its_maker_never(on_s3, monkeypatch, tmp_path):
    on_s3.adopt(folder_of(on_s3, a="1", b="2"), "x")
    there, fetched = elsewhere(on_s3, monkeypatch, tmp_path)
    on_s3.fetch("x")
    assert fetched == []
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: there.fetch("x"), range(4)))
    assert sorted(fetched) == ["a", "b"]
    assert [texts(f) for f in found] == [{"a": "1", "b": "2"}]


def test_a_copy_in_the_cache_that_lost_a_file_is_fetched_again(on_s3, monkeypatch, tmp_path):
    on_s3.adopt(folder_of(on_s3, a="1", b="2"), "x")
    there, fetched = elsewhere(on_s3, monkeypatch, tmp_path)
    (there.fetch("x") / "a").unlink()
    assert texts(there.fetch("x")) == {"a": "1", "b": "2"}
    assert sorted(fetched) == ["a", "a", "b", "b"]


@pytest.mark.parametrize("how", ["gone", "other"])
def test_a_folder_damaged_on_s3_is_not_fetched(on_s3, bucket, monkeypatch, tmp_path, how):
    on_s3.adopt(folder_of(on_s3, a="1", b="2"), "x")
    there, _ = elsewhere(on_s3, monkeypatch, tmp_path)
    if how == "gone":
        s3_client.client().delete_object(Bucket=bucket, Key="some/where/x/b")
    else:
        s3_client.client().put_object(Bucket=bucket, Key="some/where/x/b", Body=b"3")
    with pytest.raises(DamagedFolder, match=r"some/where/x: 'b' is not what the manifest says"):
        there.fetch("x")
    assert not (there.copies / "x").exists()


def test_an_object_that_would_be_written_outside_of_its_folder_is_not(on_s3, bucket, monkeypatch, tmp_path):
    on_s3.adopt(folder_of(on_s3, a="1"), "x")
    s3_client.client().put_object(Bucket=bucket, Key="some/where/x/../../../out", Body=b"3")
    there, _ = elsewhere(on_s3, monkeypatch, tmp_path)
    with pytest.raises(UnsafePath, match=r"some/where/x: the name '../../../out' leads out of its folder"):
        there.fetch("x")
    assert not list(tmp_path.rglob("out"))


def test_a_folder_is_not_there_before_its_manifest(on_s3, bucket, monkeypatch):
    """A writer that dies in the middle leaves files, which the next one writes again."""
    plain = s3_client.client()
    seen = []

    class Dying:
        def __getattr__(self, name):
            return getattr(plain, name)

        def upload_file(self, path, bucket, key):
            plain.upload_file(path, bucket, key)
            seen.append(key)
            raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(s3_client, "client", lambda **options: Dying())
        with pytest.raises(KeyboardInterrupt):
            on_s3.adopt(folder_of(on_s3, a="1"), "x")
    assert seen == ["some/where/x/a"]
    assert on_s3.read("x/manifest.json") is None
    assert on_s3.adopt(folder_of(on_s3, a="2"), "x")
    assert texts(on_s3.fetch("x")) == {"a": "2"}


def test_of_two_who_adopt_at_once_one_does(storage):
    begin = threading.Barrier(4)

    def adopt(_):
        folder = folder_of(storage, a="same")
        begin.wait()
        return storage.adopt(folder, "x")

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(adopt, range(4)))
    assert sum(won) == 1
    assert texts(storage.fetch("x")) == {"a": "same"}


def test_locations_do_not_share_a_cache(on_s3, bucket):
    other = S3Storage(f"s3://{bucket}/else/where")
    on_s3.adopt(folder_of(on_s3, a="1"), "x")
    other.adopt(folder_of(other, a="2"), "x")
    assert (texts(on_s3.fetch("x")), texts(other.fetch("x"))) == ({"a": "1"}, {"a": "2"})


def test_a_local_folder_is_opened_by_its_path(tmp_path):
    assert isinstance(open_storage(str(tmp_path / "s")), LocalStorage)


def test_a_copy_is_the_same_bytes_and_gives_their_digest(tmp_path):
    for name, data in (("some", os.urandom(3 << 20)), ("none", b"")):
        (tmp_path / name).write_bytes(data)
        assert copied(tmp_path / name, tmp_path / "copy") == hashlib.sha256(data).hexdigest()
        assert (tmp_path / "copy").read_bytes() == data
