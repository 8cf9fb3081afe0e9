"""How many workers share a step's work, from its process to the journal and `lfm show`."""

import json
from types import SimpleNamespace

from operators.resources import Resources
from pipelines.__main__ import main
from pipelines.groups import Groups
from pipelines.lineage import Event, history, states
from pipelines.storage.base import StorageFailed
from pipelines.view import heard
from tests.pipelines.journals import Written

RANGE = Resources(workers=(1, 4), strategy="ddp")


def task(step, resources=RANGE):
    return SimpleNamespace(step=step, attempt=2, resources=resources, groups=f"runs/r/groups/{step}/2.jsonl")


def say(storage, step, workers, why):
    line = json.dumps({"workers": workers, "why": why})
    storage.append(f"runs/r/groups/{step}/2.jsonl", f"{line}\n".encode())


def test_a_driver_hears_of_each_change_once_and_in_order(store, monkeypatch):
    storage, groups = store.storage, Groups(store.storage)
    tasks = [task("a"), task("b"), task("fixed", Resources())]
    assert groups.news(tasks) == []
    say(storage, "a", 1, "so")
    say(storage, "fixed", 9, "nobody asks")
    assert groups.news(tasks) == [Event("workers", "a", {"workers": 1, "why": "so", "attempt": 2})]
    say(storage, "a", 2, "more")
    say(storage, "a", 1, "less")
    storage.append("runs/r/groups/b/2.jsonl", b'{"workers": 3, "wh')  # the rest is under way
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read", refuse)
        assert groups.news(tasks) == []
    assert [e.data["workers"] for e in groups.news(tasks)] == [2, 1]
    storage.append("runs/r/groups/b/2.jsonl", b'y": ""}\n')
    assert [(e.step, e.data["workers"]) for e in groups.news(tasks)] == [("b", 3)]


def refuse(key):
    raise StorageFailed(key, "away")


def test_how_many_workers_a_step_has_is_shown(store, capsys):
    run = Written(store)
    run.begin("prepared", "tuned")
    run.reuse("prepared")
    run.start("tuned")
    run.write("workers", "tuned", workers=1, why="1 to 4 may share the work", attempt=1)
    run.write("workers", "tuned", workers=4, why="there is room for more", attempt=1)
    run.measure("tuned", 1, 3.0, 2.5)
    events = history(store.storage, "r")
    now = states(events, ["prepared", "tuned"])
    assert (now["tuned"].state, now["tuned"].attempts, now["tuned"].data["workers"]) == ("running", 1, 4)
    assert heard(store.storage, events)[-1].kind == "heard", "an attempt goes on after such an event"
    assert main(["show", "r", "--store", store.storage.uri]) == 0
    out = capsys.readouterr().out
    assert "tuned: 1 worker from now on, 1 to 4 may share the work" in out
    assert "tuned: 4 workers from now on, there is room for more" in out
