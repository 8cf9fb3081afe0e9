"""A run that a driver on another machine drives: what is seen of it here, and how it ends."""

import json
import os
import time

import pytest

from pipelines import stops
from pipelines.__main__ import main
from pipelines.commands import stop
from pipelines.lineage import Event, history, status
from pipelines.store import canonical

PROFILE = """
name: gpus
place: address
address: head:6379
storage: STORE
head: {cpus: 4, memory_gib: 16}
"""
STEPS = {"a": {"needs": []}}


class FakeJobs:
    """Knows two attempts, and what was asked of them."""

    def __init__(self):
        self.stopped, self.beside = [], []

    def of_run(self, run):
        return {1: "failed", 2: "running"}

    def stop(self, job):
        self.stopped.append(job)

    def submit_beside(self, other, job, entrypoint):
        self.beside.append((other, entrypoint))

    def ended(self, job):
        return "succeeded"


@pytest.fixture
def remote(store):
    """A run that a process of another machine has claimed."""
    claim = canonical({"host": "elsewhere", "pid": 1, "born": 1.0, "counts": 0})
    store.storage.put_if_absent("runs/one/claims/000001.json", claim)
    write(store, 1, Event("started", data={"run": "one", "steps": STEPS, "address": "auto"}, time=1.0))
    return store.storage


def write(store, number, *events):
    said = [{"kind": e.kind, "step": e.step, "data": e.data, "time": e.time} for e in events]
    store.storage.put_if_absent(f"runs/one/journal/000001-{number:06}.json", json.dumps(said).encode())


@pytest.fixture
def jobs(monkeypatch):
    made = FakeJobs()
    monkeypatch.setattr(stop, "Jobs", lambda profile: made)
    return made


def typed(remote, tmp_path, *words):
    (tmp_path / "gpus.yaml").write_text(PROFILE.replace("STORE", remote.uri))
    return main(["stop", "one", *words, *(["--cluster", str(tmp_path / "gpus.yaml")] if not words else [])])


def silent_for(remote, seconds):
    then = time.time() - seconds
    os.utime(remote.root / "runs/one/claims/000001.json", (then, then))


def test_a_driver_elsewhere_lives_as_long_as_it_says_so(remote):
    assert status(remote, "one", history(remote, "one")) == "running"
    silent_for(remote, 120)
    assert status(remote, "one", history(remote, "one")) == "interrupted"


def test_it_is_asked_to_end_and_is_waited_for(remote, store, tmp_path, jobs, monkeypatch, capsys):
    def slept(seconds):
        assert stops.asked(remote, "one")
        write(store, 2, Event("finished", data={"status": "interrupted", "why": stops.ASKED}, time=2.0))

    monkeypatch.setattr(stop.time, "sleep", slept)
    assert typed(remote, tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run one stopped"
    assert not jobs.stopped
    assert typed(remote, tmp_path) == 0
    assert capsys.readouterr().out == "run one is not going on\n"


def test_one_that_does_not_answer_is_ended_with_its_job(remote, tmp_path, jobs, monkeypatch, capsys):
    monkeypatch.setattr(stop, "LEASE_S", -1e9)
    assert typed(remote, tmp_path) == 0
    assert jobs.stopped == ["one-attempt-2"]
    assert typed(remote, tmp_path, "--store", remote.uri) == 1
    assert "Name its cluster with --cluster." in capsys.readouterr().out


def test_endpoints_that_it_has_left_up_go_down_from_inside_of_its_cluster(remote, store, tmp_path, jobs, capsys):
    about = {"name": "model", "url": "http://head:8000/v1", "model": "0" * 64, "probe": {}}
    made = {"artifact": "deployment", "digest": "1" * 64, "about": about, "attempt": 1}
    write(store, 2, Event("commit", "a", made, 2.0), Event("finished", data={"status": "done"}, time=3.0))
    assert typed(remote, tmp_path) == 0
    assert jobs.beside == [("one-attempt-2", f"python -m pipelines stop one --store {remote.uri}")]
    assert capsys.readouterr().out == "run one stopped\n"
