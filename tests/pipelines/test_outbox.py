"""What is open, where it goes, and whose turn it is."""

import os
import socket
import subprocess
import sys
import time

import pytest

from pipelines.credentials import SecretInUri
from pipelines.store import canonical
from pipelines.tracking import outbox
from pipelines.tracking.outbox import Entry, NoTracking, turn


def test_an_entry_is_there_until_it_is_closed(either_store):
    storage = either_store.storage
    outbox.enter(storage, "one", "own")
    outbox.enter(storage, "two", "http://somewhere")
    outbox.enter(storage, "two", "own")
    outbox.note(storage, "one", Entry("own", (1, 4)))
    assert outbox.entries(storage) == {"one": Entry("own", (1, 4)), "two": Entry("own", (0, 0))}
    outbox.enter(storage, "one", "own")
    assert outbox.entries(storage)["one"].told == (0, 0)
    outbox.close(storage, "one")
    outbox.close(storage, "one")
    outbox.note(storage, "one", Entry("own", (1, 5)))
    assert list(outbox.entries(storage)) == ["two"]


def test_turns_do_not_overlap(either_store):
    with turn(either_store.storage) as mine:
        assert mine
        with turn(either_store.storage) as another:
            assert not another
        with turn(either_store.storage) as another:
            assert not another
    with turn(either_store.storage) as mine:
        assert mine


def test_a_turn_ends_with_a_failure(store):
    with pytest.raises(ValueError, match="down"), turn(store.storage):
        raise ValueError("down")
    with turn(store.storage) as mine:
        assert mine


def test_a_killed_process_gives_up_its_turn(store):
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom pipelines.storage.local import LocalStorage\n"
        "from pipelines.tracking.outbox import turn\nwith turn(LocalStorage(Path(sys.argv[1]))) as mine:\n"
        "    print(mine, flush=True)\n    input()\n"
    )
    words = [sys.executable, "-c", code, store.storage.uri]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with turn(store.storage) as mine:
            assert not mine
        other.kill()
        other.wait()
    with turn(store.storage) as mine:
        assert mine


@pytest.mark.parametrize(("age", "given_up"), [(0.0, False), (outbox.FOREIGN_TURN_S + 1, True)])
def test_a_turn_of_another_machine_counts_for_a_while(store, age, given_up):
    held = {"host": f"not-{socket.gethostname()}", "pid": os.getpid(), "born": 1.0, "since": time.time() - age}
    store.storage.put_if_absent(outbox.TURN, canonical(held))
    with turn(store.storage) as mine:
        assert mine is given_up


def test_what_was_asked_for_comes_before_the_environment_and_that_before_the_stores_own(store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert outbox.tracking("", store.storage) == "own"
    assert outbox.resolved("own", store.storage) == f"sqlite:///{store.storage.uri}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert outbox.tracking("", store.storage) == "http://host:5000"
    assert outbox.tracking("none", store.storage) == "none"
    assert outbox.tracking("own", store.storage) == "own"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert outbox.tracking("", store.storage) == "none"
    assert outbox.tracking("postgresql+psycopg2://user@host/x", store.storage) == "postgresql+psycopg2://user@host/x"


def test_a_relative_database_is_meant_from_here(store, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert outbox.tracking("sqlite:///x/y.db", store.storage) == f"sqlite:///{tmp_path}/x/y.db"
    assert outbox.tracking("sqlite:////x/y.db", store.storage) == "sqlite:////x/y.db"


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "databricks", "ftp://host"])
def test_what_mlflow_cannot_use_is_refused(store, uri):
    with pytest.raises(NoTracking, match="is no tracking server and no database, expected http"):
        outbox.tracking(uri, store.storage)


def test_a_password_is_neither_written_down_nor_said(store):
    with pytest.raises(SecretInUri) as raised:
        outbox.tracking("postgresql://user:hidden@host/db", store.storage)
    assert str(raised.value) == (
        "MLflow: 'postgresql://user:...@host/db' holds a password or a token, which would be written down, expected "
        "none. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN; for a database what "
        "its own client reads, such as PGPASSWORD."
    )
    assert type(raised.value)(*raised.value.args).args == raised.value.args


def test_a_bucket_has_no_mlflow_of_its_own(s3_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert outbox.tracking("", s3_store.storage) == "none"
    with pytest.raises(NoTracking):
        outbox.tracking("own", s3_store.storage)
