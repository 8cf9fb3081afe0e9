"""What the terminal says of a run, also of one whose driver was killed or stays for its endpoints."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text

from pipelines import lineage
from pipelines.__main__ import main
from pipelines.commands import ps, show
from pipelines.lineage import Event, StepState, history, states
from pipelines.view import LiveTable, heard, row
from tests.pipelines.journals import BEGAN, Written


def resumed(store, after):
    """The same run with another driver, which comes so many seconds after the first one began."""
    run = Written(store)
    run.clock = BEGAN + after
    return run


def report(run, step, after, attempt=1):
    """A step says how far it is, so many seconds after the first driver began."""
    line = {"done": 1, "total": 2, "time": BEGAN + after}
    run.store.storage.append(f"runs/{run.name}/measures/{step}/{attempt}.jsonl", (json.dumps(line) + "\n").encode())


def last_of_each(run):
    """The last event of each driver, as kind and seconds."""
    events = heard(run.store.storage, history(run.store.storage, run.name))
    return [(own[-1].kind, own[-1].time - BEGAN) for own in lineage.by_driver(events)]


@pytest.fixture
def typed(store, capsys):
    """Types a command and gives what it printed."""

    def type_(*words):
        assert main([*words, "--store", store.storage.uri]) == 0
        return capsys.readouterr().out

    return type_


@pytest.fixture
def killed(store):
    """A run whose driver was killed after 3 s, while one step went on reporting."""
    run = Written(store)
    run.begin("prepared", "tuned", "merged")
    run.start("prepared")
    run.start("tuned")
    report(run, "prepared", 2.5)
    report(run, "tuned", 61.0)
    return run


# ---- until when something is known


def test_a_killed_driver_was_heard_of_last_when_one_of_its_steps_reported(killed):
    assert last_of_each(killed) == [("heard", 61.0)]


def test_nothing_is_heard_of_a_driver_after_the_next_one_s_claim(killed):
    resumed(killed.store, 29.0).begin("prepared", "tuned", "merged")
    assert last_of_each(killed) == [("heard", 30.0), ("started", 30.0)]


def test_what_ended_is_not_heard_of_again(killed):
    killed.fail("tuned", 1)
    assert last_of_each(killed) == [("fail", 4.0)]
    killed.end("interrupted")
    report(killed, "prepared", 61.0)
    assert last_of_each(killed) == [("finished", 5.0)]


def test_the_last_report_of_the_attempt_that_still_ran_counts(killed):
    killed.fail("tuned", 1)
    killed.start("tuned", 2)
    assert last_of_each(killed) == [("start", 5.0)]
    report(killed, "tuned", 7.0, attempt=2)
    assert last_of_each(killed) == [("heard", 7.0)]


def test_a_step_of_which_no_driver_lives_was_interrupted_when_that_was_heard_of_last():
    events = [Event("started", time=1.0), Event("start", "a", {}, 2.0), Event("heard", time=50.0)]
    assert states(events, ["a", "b"])["a"].state == "running"
    found = states(events, ["a", "b"], live=False)
    assert (found["a"].state, found["a"].began, found["a"].ended) == ("interrupted", 2.0, 50.0)
    assert found["b"].state == "waiting"
    again = states([*events, Event("started", time=90.0)], ["a"])["a"]
    assert (again.state, again.ended) == ("interrupted", 50.0)


# ---- the commands


def test_a_killed_run_and_its_steps_end_with_the_last_report(killed, typed):
    said = json.loads(typed("show", "r", "--json"))
    assert (said["status"], said["seconds"], said["ended"]) == ("interrupted", 60.0, BEGAN + 61)
    assert {n: (s["state"], s["ended"]) for n, s in said["steps"].items()} == {
        "prepared": ("interrupted", BEGAN + 61),
        "tuned": ("interrupted", BEGAN + 61),
        "merged": ("waiting", 0.0),
    }
    lines = typed("show", "r").splitlines()
    assert lines[0] == "run r: interrupted, 1 min 0 s"
    assert lines[2].split() == ["prepared", "interrupted", "59.0", "s"]
    assert lines[3].split() == ["tuned", "interrupted", "58.0", "s"]
    (listed,) = json.loads(typed("ps", "--json"))
    assert (listed["status"], listed["seconds"]) == ("interrupted", 60.0)
    assert "1 min 0 s" in typed("ps")


def test_a_run_that_goes_on_took_the_time_until_now(killed, typed, monkeypatch):
    monkeypatch.setattr(lineage, "lives", lambda storage, run: True)
    for command in (show, ps):
        monkeypatch.setattr(command, "time", SimpleNamespace(time=lambda: BEGAN + 101))
    said = json.loads(typed("show", "r", "--json"))
    assert (said["status"], said["seconds"]) == ("running", 100.0)
    assert [s["state"] for s in said["steps"].values()] == ["running", "running", "waiting"]
    lines = typed("show", "r").splitlines()
    assert lines[0] == "run r: running, 1 min 40 s"
    assert lines[2].split() == ["prepared", "running", "1/2", "1", "min", "39", "s"]
    assert json.loads(typed("ps", "--json"))[0]["seconds"] == 100.0


def test_what_a_run_did_before_it_was_resumed_is_done_and_keeps_its_time(store, typed):
    run = Written(store)
    run.begin("prepared", "tuned", "merged")
    run.reuse("prepared")
    run.start("tuned")
    run.clock += 30
    run.commit("tuned")
    run.start("merged")
    run = resumed(store, 7200.0)
    run.begin("prepared", "tuned", "merged")
    run.reuse("prepared")
    run.reuse("tuned")
    run.start("merged", 2)
    run.commit("merged", 2)
    run.end()
    lines = typed("show", "r").splitlines()
    assert lines[0] == "run r: done, 39.0 s"
    assert [line.split()[:4] for line in lines[2:4]] == [
        ["prepared", "reused", run.made["prepared"][:12]],
        ["tuned", "done", "31.0", "s"],
    ]
    assert lines[4].split()[:4] == ["merged", "done", "1.0", "s"]


@pytest.mark.parametrize("lives", [True, False])
def test_what_endpoints_were_up_for_is_told_apart_from_the_work(store, typed, monkeypatch, lives):
    run = Written(store)
    run.begin("prepared")
    run.start("prepared")
    run.commit("prepared")
    run.write("serving", endpoints=[])
    if lives:
        monkeypatch.setattr(lineage, "lives", lambda storage, run: True)
        monkeypatch.setattr(show, "time", SimpleNamespace(time=lambda: BEGAN + 3604))
    else:
        run.clock += 3599
        run.end()
    status = "serving" if lives else "done"
    assert typed("show", "r").splitlines()[0] == f"run r: {status}, 3.0 s, then served for 1 h 0 min"
    said = json.loads(typed("show", "r", "--json"))
    assert (said["status"], said["seconds"], said["served"]) == (status, 3.0, 3600.0)
    (listed,) = json.loads(typed("ps", "--json"))
    assert (listed["status"], listed["seconds"]) == (status, 3.0)


def test_of_many_steps_those_that_say_most_are_shown_and_the_others_counted(store):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=7)
    events = [
        *(Event("start", f"s{i}", {"log": ""}, 1.0) for i in range(10)),
        *(Event("commit", f"s{i}", {}, 2.0) for i in range(8)),
        Event("fail", "s9", {"sentence": "asked to"}, 3.0),
        Event("wait", "s15", {"why": "nothing holds it"}, 4.0),
    ]
    table = LiveTable(SimpleNamespace(steps=[f"s{i}" for i in range(20)]), store.storage, console)
    with table:
        table(events[:3])
        table(events[3:])
    lines = [line.split() for line in Text.from_ansi(console.file.getvalue()).plain.splitlines()]
    assert [line[:2] for line in lines[-4:-1]] == [["s8", "running"], ["s9", "failed"], ["s15", "waiting"]]
    assert " ".join(lines[-1]) == "3 of 20 steps: 1 running, 8 done, 1 failed, 10 waiting"


def test_an_interrupted_step_does_not_count_on(store):
    state = StepState(state="interrupted", attempts=1, began=10.0, ended=15.0, data={"log": "runs/r/logs/a/1.log"})
    assert row("a", state, store.storage, 9e9) == ("[yellow]interrupted[/]", "", "", "", "5.0 s", "")
