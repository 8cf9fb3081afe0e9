"""One attempt at one step, without Ray."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from operators.artifact import Dataset
from operators.code import Code
from operators.resources import Resources
from pipelines.execute import Task, _Workspace, execute, memory_of
from pipelines.inputs.inspector import Looks
from pipelines.lineage import history
from pipelines.printing import Unwritten
from pipelines.view import measured
from tests.conftest import NOOP

UNTIDY = '''
import os, random, signal
import numpy, torch
from operators.artifact import Dataset
from operators.base import operator
from operators.sharing.notices import Preempted
from operators.workspace import Workspace

@operator()
def untidy(work: Workspace) -> Dataset:
    """Change everything that a process has."""
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    os.chdir("/")
    os.environ["LEFT"] = "behind"
    os.environ.pop("TAKEN", None)
    signal.signal(signal.SIGUSR1, lambda *a: None)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(7)
    (work.scratch / "x.txt").write_text("x")
    return work.save(Dataset, work.scratch / "x.txt")

@operator()
def diverging(work: Workspace) -> Dataset:
    """Measure something and fail."""
    for done, loss in enumerate((1.0, 2.0, 400.0), 1):
        work.progress(done, 9, loss=loss)
    raise ArithmeticError("diverged")

@operator()
def asked_to_end(work: Workspace) -> Dataset:
    """Be ended as a node ends what runs on it."""
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("it goes on")

@operator()
def leaving(work: Workspace) -> Dataset:
    """Hear that it has to go."""
    raise Preempted(3, 9)

@operator()
def checkpointing(work: Workspace, *, fail: bool = False) -> Dataset:
    """Keep a checkpoint, fail, and go on from it."""
    found = work.kept()
    said = (found / "state.txt").read_text() if found else "nothing"
    for n in range(2):
        (work.scratch / "c").mkdir()
        (work.scratch / "c" / "state.txt").write_text(f"{said} and {n}")
        (work.scratch / "c" / "manifest.json").write_text("{}")
        work.keep(work.scratch / "c")
    if not found:
        raise RuntimeError("first attempt")
    (work.scratch / "x.txt").write_text(said)
    return work.save(Dataset, work.scratch / "x.txt")
'''
CODE = Code(("noop.py", "untidy.py"), (("noop.py", NOOP), ("untidy.py", UNTIDY)))


def task(store, operator, **fields):
    given = {
        "store": store.storage.uri,
        "run": "r",
        "step": "s",
        "attempt": 1,
        "operator": operator,
        "method": None,
        "params": {},
        "inputs": {},
        "resources": Resources(),
        "effect": False,
        "fingerprint": "ab" * 32,
        "components": {"operator": operator},
        "code": CODE,
    }
    return Task(**{**given, **fields})


def test_a_step_commits_what_it_made(store, tmp_path):
    (tmp_path / "in.txt").write_text("in")
    given = Looks(memory_of(store.storage), store).pin(Dataset(str(tmp_path / "in.txt")))
    done = execute(task(store, "noop", params={"size": 3}, inputs={"after": [given]}))
    assert done["kind"] == "commit"
    result = store.hit("ab" * 32)
    assert result.digest == done["digest"]
    assert result.inputs == {"after": [{"kind": "dataset", "digest": given.digest, "uri": given.uri}]}
    assert (store.get(result.digest).path / "data.txt").read_text() == "xxx"
    assert os.listdir(store.storage.root / "scratch") == []


@pytest.mark.parametrize(
    ("stopped", "error", "said"),
    [
        (False, "Preempted", "its machine is about to be taken away, expected one that stays for all 9 steps. What"),
        (True, "Stopped", "its run is about to end, expected it to go on for all 9 steps. What it had done after 3"),
    ],
)
def test_a_step_says_whether_its_machine_goes_or_its_run_ends(store, monkeypatch, capsys, stopped, error, said):
    monkeypatch.setattr("pipelines.execute.recalled", lambda: stopped)
    failed = execute(task(store, "leaving"))
    assert (failed["error"], failed["class"]) == (error, "preemption")
    assert failed["sentence"].startswith(said)
    assert ("machine" in capsys.readouterr().err) is not stopped, "nothing is said of the other"


def test_a_step_that_was_asked_to_end_may_be_tried_again(store):
    before = signal.getsignal(signal.SIGTERM)
    failed = execute(task(store, "asked_to_end"))
    assert (failed["error"], failed["class"]) == ("Terminated", "other")
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_attempt_repeated_draws_the_same_seed(store):
    seeds = {execute(task(store, "noop", attempt=n))["about"]["seed"] for n in (1, 2)}
    other = execute(task(store, "noop", fingerprint="cd" * 32))["about"]["seed"]
    assert len(seeds | {other}) == 2


def test_progress_and_measures_can_be_read_while_it_runs(store):
    made = task(store, "noop")
    execute(made)
    (line,) = measured(store.storage, made.log)
    assert (line["done"], line["total"], line["measures"]) == (1, 2, {"loss": 0.5})


def test_what_a_step_measured_last_can_be_read_though_it_failed(store):
    made = task(store, "diverging")
    assert execute(made)["error"] == "ArithmeticError"
    assert [line["measures"]["loss"] for line in measured(store.storage, made.log)] == [1.0, 2.0, 400.0]


def test_what_was_changed_after_the_plan_is_refused(store, tmp_path):
    (tmp_path / "in.txt").write_text("in")
    given = Looks(memory_of(store.storage), store).pin(Dataset(str(tmp_path / "in.txt")))
    (tmp_path / "in.txt").write_text("changed")
    failed = execute(task(store, "noop", inputs={"after": [given]}))
    assert failed["error"] == "InputChanged"
    assert failed["sentence"].endswith("expected it to stay. Start a new run.")


@pytest.mark.parametrize(("how", "error"), [("raise", "ValueError"), ("exit", "SystemExit")])
def test_a_failure_is_an_answer(store, how, error):
    failed = execute(task(store, "noop", params={"fail": how}))
    assert (failed["kind"], failed["error"]) == ("fail", error)
    assert store.result("ab" * 32) is None
    assert os.listdir(store.storage.root / "scratch") == []


def test_the_process_is_as_it_was_before(store, monkeypatch):
    monkeypatch.setenv("TAKEN", "stays")
    torch.set_num_threads(3)
    handler = signal.getsignal(signal.SIGUSR1)
    before = (Path.cwd(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert execute(task(store, "untidy"))["kind"] == "commit"
    after = (Path.cwd(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert after == before
    assert os.environ["TAKEN"] == "stays"
    assert "LEFT" not in os.environ
    assert signal.getsignal(signal.SIGUSR1) == handler
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


def checkpoints(store):
    return sorted({k.split("/")[2] for k in store.storage.list("checkpoints")})


def test_an_attempt_goes_on_from_the_last_checkpoint_which_goes_when_it_ends_well(store):
    assert execute(task(store, "checkpointing"))["sentence"] == "first attempt"
    assert [name.partition("-")[0] for name in checkpoints(store)] == ["000001", "000002"]
    done = execute(task(store, "checkpointing", attempt=2))
    assert (store.get(done["digest"]).path / "x.txt").read_text() == "nothing and 1"
    assert checkpoints(store) == []
    assert history(store.storage, "r") == []


def test_what_was_measured_up_to_a_checkpoint_can_be_read_when_it_is_there(store, tmp_path):
    """Who goes on from it does not measure that again."""
    made = task(store, "noop")
    work = _Workspace(tmp_path, made, store.storage, Unwritten())
    for step in (1, 2, 3):
        work.progress(step, 9, loss=float(step))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "manifest.json").write_text("{}")
    work.keep(tmp_path / "state")
    assert [line["measures"]["loss"] for line in measured(store.storage, made.log)] == [1.0, 2.0, 3.0]


def shorter(folder):
    (folder / "state.txt").write_bytes((folder / "state.txt").read_bytes()[:-1])


def flipped(folder):
    (folder / "state.txt").write_text("nothing and 7")


def without_a_file(folder):
    (folder / "state.txt").unlink()


def without_its_manifest(folder):
    (folder / "manifest.json").unlink()


def with_half_its_manifest(folder):
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:20])


def with_another_manifest(folder):
    said = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**said, "step": 7}))


@pytest.mark.parametrize(
    "damage", [shorter, flipped, without_a_file, without_its_manifest, with_half_its_manifest, with_another_manifest]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(store, damage):
    execute(task(store, "checkpointing"))
    newest = store.storage.root / "checkpoints" / ("ab" * 32) / checkpoints(store)[-1]
    for file in newest.iterdir():
        file.chmod(0o644)
    damage(newest)
    done = execute(task(store, "checkpointing", attempt=2))
    assert (store.get(done["digest"]).path / "x.txt").read_text() == "nothing and 0"


def test_without_a_whole_checkpoint_a_step_begins_anew(store, capsys):
    execute(task(store, "checkpointing"))
    for name in checkpoints(store):
        path = store.storage.root / "checkpoints" / ("ab" * 32) / name / "state.txt"
        path.chmod(0o644)
        path.write_text("x")
    assert execute(task(store, "checkpointing", attempt=2))["sentence"] == "first attempt"
    assert capsys.readouterr().err.count("'state.txt' is not what was kept, so it counts as lost.") == 2
    assert len(store.storage.folders("quarantine")) == 2


def test_a_step_that_changes_midway_goes_on_from_what_the_same_step_before_the_change_has_kept(store, tmp_path):
    def at_work(fingerprint, *earlier):
        made = task(store, "noop", fingerprint=fingerprint * 64, earlier=earlier)
        return _Workspace(tmp_path, made, store.storage, Unwritten())

    def keep(work, step):
        folder = tmp_path / f"{work.seed}-{step}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"step": step}))
        work.keep(folder)

    def step_of(work):
        found = work.kept()
        return None if found is None else json.loads((found / "manifest.json").read_text())["step"]

    first, second = at_work("a"), at_work("b", (4, "a" * 64))
    third = at_work("c", (6, "b" * 64), (4, "a" * 64))
    assert (step_of(second), step_of(third)) == (None, None)
    keep(first, 4)
    assert (step_of(second), step_of(third)) == (4, 4)
    keep(second, 6)
    assert (step_of(second), step_of(third)) == (6, 6)
    keep(first, 5)  # which went on without the change
    assert (step_of(second), step_of(third)) == (6, 6)
    second.forget()
    assert (step_of(second), step_of(third)) == (None, None)
    keep(third, 8)
    assert step_of(third) == 8
