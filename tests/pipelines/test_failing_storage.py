"""Wherever storage refuses something, a step or a driver ends cleanly, and the next one goes on to the same end."""

import errno
import hashlib
import os
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ConnectionClosedError
from botocore.httpsession import URLLib3Session
from safetensors import SafetensorError
from safetensors.torch import save_file

from operators.artifact import Dataset
from operators.code import Code
from pipelines import execute as module, printing
from pipelines.__main__ import main
from pipelines.execute import execute
from pipelines.failures import Failure, classify
from pipelines.lineage import Event, Journal, history, states
from pipelines.registry import Registry
from pipelines.run import run
from pipelines.storage import digests, s3, s3_client
from pipelines.storage.base import StorageFailed, remove
from pipelines.storage.digests import Digests
from pipelines.storage.local import LocalStorage
from pipelines.store import Store
from pipelines.view import measured, sentence
from tests.pipelines.failing import READS, WRITES, Clock, FailingStorage, FakePool, fast
from tests.pipelines.graphs import Step, digests_of, planned
from tests.pipelines.test_execute import task

pytestmark = pytest.mark.slow

BUSY = '''
"""An operator that does all that a step can do."""

import json

from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace


@operator()
def busy(work: Workspace, *, data: Dataset) -> Dataset:
    """Go on from a checkpoint or begin, measure, keep, register, print and save."""
    found = work.kept()
    first = json.loads((found / "manifest.json").read_text())["step"] if found else 0
    for step in range(first, 3):
        work.progress(step + 1, 3, loss=1.0 / (step + 1))
        folder = work.scratch / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "state.txt").write_text(str(step))
        (folder / "manifest.json").write_text(json.dumps({"step": step + 1}))
        work.keep(folder)
    for alias in ("first", "second"):
        work.register(data, "thing", alias)
    print("busy says hello")
    (work.scratch / "made").mkdir()
    (work.scratch / "made" / "x.txt").write_text(data.path.joinpath("text.txt").read_text().upper())
    return work.save(Dataset, work.scratch / "made")
'''
CODE = Code(("busy.py",), (("busy.py", BUSY),))
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
SMALL = 1 << 20  # bytes of a small file system


@pytest.fixture(autouse=True)
def hasty_disk(monkeypatch):
    """A disk that nobody waits for: these tests write a great deal and lose no power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def small(tmp_path):
    """A real file system of `SMALL` bytes."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "small", place], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def put(store):
    """What the step takes: an artifact."""
    folder = store.storage.scratch()
    (folder / "text.txt").write_text("some text")
    return store.put(folder, "dataset", {})


def busy(store, **fields):
    return task(store, "busy", code=CODE, inputs={"data": Dataset("", put(store), {})}, **fields)


def attempt(asked, monkeypatch, **fault):
    """The outcome of one attempt under a fault, and the storage that had it."""
    opened = []

    def open_storage(uri):
        opened.append(FailingStorage(LocalStorage(Path(uri)), **fault))
        return opened[-1]

    with monkeypatch.context() as patched:
        patched.setattr(module, "open_storage", open_storage)
        return execute(asked), opened[0]


@pytest.fixture
def undisturbed(tmp_path, monkeypatch):
    """The digest of an attempt to which nothing happens, and its calls."""
    store = Store(LocalStorage(tmp_path / "undisturbed"))
    done, storage = attempt(busy(store), monkeypatch, verbs=WRITES + READS)
    assert done["kind"] == "commit", done
    return done["digest"], storage.calls


def consistent(store, digest):
    """Nothing in a store is half there."""
    hit = store.hit("ab" * 32)
    assert hit is None or hit.digest == digest
    for one in store.storage.folders("artifacts"):
        assert store.whole(one, bytes_too=True), one
    registry = Registry(store.storage)
    numbers = [v.number for v in registry.versions("thing")]
    assert numbers in ([], [1])
    assert set(registry.aliases("thing").values()) <= set(numbers)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_step_of_which_one_write_fails_ends_cleanly_and_the_next_attempt_ends_well(
    undisturbed, tmp_path, monkeypatch, error, after
):
    digest, calls = undisturbed
    for number in range(1, 1 + sum(verb in WRITES for verb, _ in calls)):
        store = Store(LocalStorage(tmp_path / str(number)))
        asked = busy(store)
        done, storage = attempt(asked, monkeypatch, number=number, error=error, after=after)
        verb, key = storage.refused
        consistent(store, digest)
        if key.startswith("runs/") or (verb == "delete" and store.hit("ab" * 32)):  # measures, and what is done with
            assert done["kind"] == "commit", (verb, key, done)
            assert ("unwritten" in done) == (verb == "append"), (verb, key, done)
        else:
            assert (done["kind"], done["class"]) == ("fail", "storage"), (verb, key, done)
            assert done["sentence"].startswith(f"store '{key}': {os.strerror(error).lower()}. Make room")
        again = execute(asked)
        assert (again["kind"], again["digest"]) == ("commit", digest), (verb, key, again)
        consistent(store, digest)


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_step_of_which_one_read_fails_ends_cleanly_and_the_next_attempt_ends_well(
    undisturbed, tmp_path, monkeypatch, error
):
    digest, calls = undisturbed
    for number in range(1, 1 + sum(verb in READS for verb, _ in calls)):
        store = Store(LocalStorage(tmp_path / str(number)))
        asked = busy(store)
        done, storage = attempt(asked, monkeypatch, verbs=READS, number=number, error=error)
        consistent(store, digest)
        committed = store.hit("ab" * 32) is not None
        assert done["kind"] == ("commit" if committed else "fail"), (storage.refused, done)
        assert committed or done["class"] == "storage", (storage.refused, done)
        assert execute(asked)["digest"] == digest
        consistent(store, digest)


def test_a_step_on_a_disk_that_stays_full_ends_cleanly_wherever_that_begins(undisturbed, tmp_path, monkeypatch):
    digest, calls = undisturbed
    for number in range(1, 1 + sum(verb in WRITES for verb, _ in calls)):
        store = Store(LocalStorage(tmp_path / str(number)))
        asked = busy(store)
        done, storage = attempt(asked, monkeypatch, number=number, error=errno.ENOSPC, lasting=True)
        consistent(store, digest)
        committed = store.hit("ab" * 32) is not None
        assert done["kind"] == ("commit" if committed else "fail"), (storage.refused, done)
        assert committed or done["class"] == "storage", (storage.refused, done)
        again = execute(asked)
        assert (again["kind"], again["digest"]) == ("commit", digest), (storage.refused, again)
        consistent(store, digest)


def test_a_store_that_cannot_be_opened_is_a_failure_with_its_reason(store, tmp_path):
    (tmp_path / "file").write_text("")
    failed = execute(replace(busy(store), store=str(tmp_path / "file" / "store")))
    assert (failed["kind"], failed["class"], failed["error"]) == ("fail", "storage", "UnusableStore")
    assert "not a directory, expected a location that can be written to" in failed["sentence"]


def test_a_log_that_takes_nothing_costs_a_step_its_log(store, capfd):
    asked = busy(store)
    log = store.storage.root / asked.log
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    with capfd.disabled():
        done = execute(asked)
    assert done["kind"] == "commit"
    assert done["unwritten"] == f"log {str(log)!r}: no space left on device"
    assert sentence(Event("commit", "s", done), store.storage).endswith(
        f"; not all of its log and measures is there, log {str(log)!r}: no space left on device"
    )


def test_a_log_that_cannot_be_made_costs_a_step_its_log(store):
    asked = busy(store)
    store.storage.put_if_absent(f"runs/{asked.run}/logs", b"a file where a folder has to be")
    done = execute(asked)
    assert (done["kind"], done["unwritten"].rpartition(": ")[2]) == ("commit", "not a directory")


def test_what_a_log_could_not_send_it_sends_the_next_time(store, tmp_path, monkeypatch):
    monkeypatch.setattr(printing, "SHIP_S", 0.01)
    storage = FailingStorage(store.storage, ("append",), number=1, error=errno.EIO)
    (tmp_path / "log").write_text("hello\n")
    ended, until = threading.Event(), time.monotonic() + 60
    with ThreadPoolExecutor(1) as pool:
        shipping = pool.submit(printing._ship, tmp_path / "log", storage, "log", ended)
        while store.storage.read("log") is None and time.monotonic() < until:
            time.sleep(0.01)
        ended.set()
        shipping.result()
    assert store.storage.read("log") == b"hello\n"
    assert storage.refused == ("append", "log")


def test_an_append_that_is_refused_in_the_middle_leaves_what_was_there(small):
    """Else a line of measures is cut, and whoever reads them takes it for damage."""
    storage = LocalStorage(small / "store")
    storage.append("runs/r/measures/s/1.jsonl", b'{"done": 1}\n')
    with pytest.raises(StorageFailed, match="no space left on device"):
        storage.append("runs/r/measures/s/1.jsonl", b'{"done": 2}\n' * SMALL)
    assert storage.read("runs/r/measures/s/1.jsonl") == b'{"done": 1}\n'


def test_weights_that_find_no_room_are_a_failure_of_storage(small):
    with pytest.raises(SafetensorError) as caught:
        save_file({"w": torch.zeros(SMALL)}, small / "w.safetensors")
    assert classify(caught.value) == Failure.STORAGE


def test_digests_are_found_where_they_cannot_be_remembered(small, tmp_path):
    (tmp_path / "file").write_bytes(b"some")
    (small / "fill").write_bytes(b"x" * SMALL)
    assert Digests(small / "inputs.sqlite").of([tmp_path / "file"]) == [hashlib.sha256(b"some").hexdigest()]


def test_what_cannot_be_read_does_not_count_as_damaged(store, monkeypatch, tmp_path):
    def refused(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    digest = put(store)
    with monkeypatch.context() as patched:
        patched.setattr(digests, "digest_of", refused)
        with pytest.raises(StorageFailed, match="stale file handle"):
            store.verified(digest, Digests(tmp_path / "memory.sqlite"))
    assert store.verified(digest, Digests(tmp_path / "memory.sqlite")).digest == digest
    assert store.storage.list("quarantine") == ()


@pytest.mark.parametrize("verb", ["list", "entries", "folders"])
def test_a_folder_that_cannot_be_listed_does_not_count_as_empty(store, monkeypatch, verb):
    def refused(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    put(store)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refused)
        with pytest.raises(StorageFailed, match="'artifacts': input/output error"):
            getattr(store.storage, verb)("artifacts")


GRAPH = {
    "a": Step(),
    "b": Step(("a",)),
    "c": Step(("a",), word="y" * 50_000, effect=True),
    "d": Step(("b", "c")),
}


def driven(store, plan, started=lambda task: None):
    """What a driver says of the run, or the error that it ends with."""
    clock = Clock()
    pool = FakePool(clock, started=started)
    with fast(clock):
        try:
            journal = Journal.claim(store.storage, "run")
            return run(plan, store, journal, connect=lambda: nullcontext(pool))
        except StorageFailed as error:
            return error


def test_a_run_that_a_disk_has_no_room_for_goes_on_when_there_is_some(small):
    plan, ended = planned(GRAPH), set()
    for room in range(0, 320_000, 16_000):
        store = Store(LocalStorage(small / f"store-{room}"))
        there = os.statvfs(small)
        (small / "fill").write_bytes(b"x" * (there.f_bavail * there.f_frsize - room))
        said = driven(store, plan)
        ended.add(said if isinstance(said, str) else type(said))
        if not isinstance(said, str):
            assert re.search(r": no space left on device\. Make room or give access, then resume the run\.$", str(said))
        (small / "fill").unlink()
        committed = {n for n, s in plan.steps.items() if store.hit(s.fingerprint) is not None}
        again = []
        assert driven(store, plan, again.append) == "done"
        assert not committed & {task.step for task in again}
        found = states(history(store.storage, "run"), plan.steps)
        assert {n: s.data["digest"] for n, s in found.items()} == digests_of(GRAPH)
        remove(store.storage.root)
    assert ended == {StorageFailed, "failed", "done"}, "there was always too much room, or too little"


def test_a_command_on_a_disk_that_is_full_says_so(small, project, capsys):
    LocalStorage(small / "store")
    there = os.statvfs(small)
    (small / "fill").write_bytes(b"x" * (there.f_bavail * there.f_frsize))
    assert main(["run", str(project.pipeline), "--store", str(small / "store"), "--mlflow", "none"]) == 2
    assert "no space left on device. Make room or give access, then resume the run." in capsys.readouterr().err


class Refusing:
    """What stands between a process and S3: each request is refused the first time, or all are from one on."""

    def __init__(self, how, *, after=None):
        self.how, self.after = how, after
        self.requests = []

    def __call__(self, request, **said):
        one = (request.method, request.url)
        known = one in self.requests
        self.requests.append(one)
        if known if self.after is None else len(self.requests) < self.after:
            return None
        if self.how == "lost":  # it arrives, and the answer does not
            URLLib3Session().send(request)
            raise ConnectionClosedError(endpoint_url=request.url)
        body = f"<Error><Code>{self.how}</Code><Message>Asked to refuse.</Message></Error>".encode()
        answer = AWSResponse(request.url, {"InternalError": 500, "SlowDown": 503}[self.how], {}, BytesIO(body))
        answer.raw.stream = lambda **options: iter((body,))
        return answer


@contextmanager
def refused(monkeypatch, fault):
    """Have a fault between this process and S3, and nobody wait before he tries again."""
    clients = [s3_client.client(), s3_client.client(retries=1)]
    with monkeypatch.context() as patched:
        patched.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
        patched.setattr(s3, "PAUSES_S", (0.0, 0.0, 0.0))
        for client in clients:
            client.meta.events.register("before-send.s3", fault)
        try:
            yield
        finally:
            for client in clients:
                client.meta.events.unregister("before-send.s3", fault)


@pytest.mark.parametrize("how", ["InternalError", "SlowDown", "lost"])
def test_each_request_to_s3_may_fail_once(undisturbed, s3_store, monkeypatch, how):
    digest, _ = undisturbed
    asked = busy(s3_store)
    fault = Refusing(how)
    with refused(monkeypatch, fault):
        done = execute(asked)
    assert (done["kind"], done["digest"], done.get("unwritten")) == ("commit", digest, None)
    assert len(fault.requests) > len(set(fault.requests)) > 20
    consistent(s3_store, digest)
    assert [line["done"] for line in measured(s3_store.storage, asked.log)] == [1, 2, 3]


@pytest.mark.parametrize("after", [1, 8, 20, 32, 44, 50])
def test_an_s3_that_refuses_everything_from_somewhere_on_is_a_clean_failure(undisturbed, s3_store, monkeypatch, after):
    digest, _ = undisturbed
    asked = busy(s3_store)
    with refused(monkeypatch, Refusing("SlowDown", after=after)):
        done = execute(asked)
    committed = s3_store.hit("ab" * 32) is not None
    assert done["kind"] == ("commit" if committed else "fail"), done
    assert committed or done["class"] == "storage", done
    consistent(s3_store, digest)
    assert execute(asked)["digest"] == digest
