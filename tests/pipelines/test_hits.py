"""What `lfm plan` foretells is what `lfm run` does, and `lfm why` and `lfm lineage` tell afterwards."""

import json
import re

import pytest

from pipelines.__main__ import main
from pipelines.commands import run
from pipelines.storage.base import remove

pytestmark = pytest.mark.ray

MINE = '''
"""Operators that are quick."""
import time
from collections.abc import Sequence

import near
from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace

@operator()
def write(work: Workspace, *, after: Sequence[Dataset] = (), text: str = "", idle: int = 0) -> Dataset:
    path = work.scratch / "text.txt"
    path.write_text(text + "".join(f.read_text() for a in after for f in sorted(_files(a.path))) + near.mark())
    return work.save(Dataset, path)

@operator()
def look_at_the_clock(work: Workspace, *, after: Sequence[Dataset]) -> Dataset:
    path = work.scratch / "text.txt"
    path.write_text(str(time.time_ns()))
    return work.save(Dataset, path)

@operator(effect=True)
def tell(work: Workspace, *, of: Dataset) -> Dataset:
    path = work.scratch / "text.txt"
    path.write_text("told")
    return work.save(Dataset, path)

def _files(path):
    return path.rglob("*.txt") if path.is_dir() else [path]
'''
PIPELINE = """
name: hits
uses: [mine.py]
inputs:
  one: {dataset: one.txt}
  two: {dataset: two.txt}
steps:
  a: {operator: write, inputs: {after: [one]}, params: {text: a}}
  b: {operator: write, inputs: {after: [a]}, params: {text: b}}
  c: {operator: write, inputs: {after: [b]}, params: {text: c}}
  d: {operator: write, inputs: {after: [two]}, params: {text: d}}
"""
CLOCK = """
name: clock
uses: [mine.py]
inputs:
  one: {dataset: one.txt}
steps:
  a: {operator: look_at_the_clock, inputs: {after: [one]}}
  b: {operator: write, inputs: {after: [a]}}
  told: {operator: tell, inputs: {of: b}}
"""


class Typed:
    """Commands that are typed in a folder with a pipeline."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        for name, text in (
            ("mine.py", MINE),
            ("near.py", "def mark():\n    return '!'\n"),
            ("hits.yaml", PIPELINE),
            ("clock.yaml", CLOCK),
            ("one.txt", "1"),
            ("two.txt", "2"),
        ):
            (folder / name).write_text(text)

    def __call__(self, *words):
        self.capsys.readouterr()
        assert main(list(words)) == 0, self.capsys.readouterr()
        return self.capsys.readouterr().out

    def replace(self, name, old, new):
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new))

    def states(self, command, *words):
        return {n: s["state"] for n, s in json.loads(self(command, *words, "--json"))["steps"].items()}

    def digests(self):
        return {n: s["data"]["digest"] for n, s in json.loads(self("show", "last", "--json"))["steps"].items()}

    def lose(self, digest):
        """The store's copy of an artifact goes."""
        remove(self.folder / ".lfm" / "artifacts" / digest)


@pytest.fixture
def typed(tmp_path, ray_local, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "opened", lambda *_: ray_local())
    return Typed(tmp_path, capsys)


def test_what_a_plan_calls_stored_is_what_a_run_reuses(typed):
    for edit, stored in (
        (lambda: None, ""),
        (lambda: None, "abcd"),
        (lambda: typed.replace("mine.py", "quick.", "quick.  # and small"), "abcd"),
        (lambda: typed.replace("hits.yaml", "text: b", "text: b, idle: 1"), "ad"),  # which makes the same bytes
        (lambda: typed.replace("two.txt", "2", "3"), "abc"),
        (lambda: typed.replace("hits.yaml", "text: b, idle: 1", "text: b"), "abcd"),
        (lambda: typed.replace("near.py", "'!'", "'?'"), ""),
        (lambda: typed.replace("near.py", "'?'", "'!'"), "abcd"),
        (lambda: typed.lose(typed.digests()["b"]), "acd"),
    ):
        edit()
        foretold = {n for n, state in typed.states("plan", "hits.yaml").items() if state == "stored"}
        happened = {n for n, state in typed.states("run", "hits.yaml").items() if state == "reused"}
        assert foretold == happened == set(stored)


def test_a_step_that_makes_another_digest_again_changes_nothing_that_was_made_of_the_first(typed):
    typed("run", "clock.yaml")
    (first,) = json.loads(typed("ps", "--json"))
    before = typed.digests()

    assert typed.states("run", "clock.yaml", "--force", "a") == {"a": "done", "b": "reused", "told": "done"}
    assert typed.digests() == before, "of two results the first stays"
    said = typed("why", "last", "a")
    assert said.startswith(f"a: done; run {first['run']} had made the same, but --force asked for it. It made digest ")
    assert said.endswith(f" where that was {before['a'][:12]}, which stays.\n")
    assert typed("why", "last", "b").startswith(f"b: reused what run {first['run']} made, fingerprint ")
    assert typed("why", "last", "told") == "told: done; 'tell' changes the world, which each run does again.\n"

    typed.lose(before["a"])
    assert typed.states("run", "clock.yaml") == {"a": "done", "b": "reused", "told": "done"}
    after = typed.digests()
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]
    said = typed("why", "last", "a")
    assert "but the store did not have that whole any more. It made digest " in said
    assert said.endswith(f"{after['a'][:12]} where that was {before['a'][:12]}, and what was made of that one stays.\n")
    took = (
        f"  after[0]: it took digest {before['a'][:12]}, and what makes that stands for digest {after['a'][:12]} now.\n"
    )
    assert typed("why", "last", "b").endswith(took)
    line = typed("lineage", "last/b").splitlines()[1]
    assert line == (
        f"  after[0]: dataset a (look_at_the_clock), which has made digest {after['a']} since, digest {before['a']}"
    )
    typed("show", "last", "--html", "run.html")
    assert "which it has since made anew as" in (typed.folder / "run.html").read_text()
    (_, second) = json.loads(typed("lineage", "last/b", "--json"))
    assert (second["digest"], second["remade"]["digest"]) == (before["a"], after["a"])


def test_what_has_no_fingerprint_is_never_reused_by_another_run_and_every_command_says_why(typed):
    typed.replace(
        "near.py", "def mark():\n", "import importlib\n\ndef mark():\n    importlib.import_module('ma' + 'th')\n"
    )
    line = "step a: never reused, for it has no fingerprint: near.py:4 runs code that no import names"
    after = "step b: never reused, for it has no fingerprint: step 'a' has none, near.py:4 runs code"
    for _ in range(2):
        plan = typed("plan", "hits.yaml")
        assert line in plan.splitlines()
        assert after in plan
        assert {line.split()[-2:][0] for line in plan.splitlines()[1:5]} == {"runs"}
        said = typed("run", "hits.yaml")
        assert line in said.splitlines()
        assert ": reused, " not in said
        assert line in typed("show", "last").splitlines()
        why = typed("why", "last", "a")
        assert why == f"a: done; {line.removeprefix('step a: ')}.\n"
        assert typed("resume", "last").count(": reused, ") == 4, "a run knows its own results"


def test_what_was_not_hashed_is_unknown_to_a_plan_which_says_why(typed):
    typed("run", "hits.yaml")
    said = typed("plan", "hits.yaml", "--no-hash")
    assert re.findall(r"\b(unknown|stored|runs)\b", said.partition("step a:")[0]) == ["unknown"] * 4
    assert "step a: never reused, for it has no fingerprint: input 'one' was not hashed" in said.splitlines()
    assert "step c: never reused, for it has no fingerprint: step 'b' has none" in said.splitlines()
    told = json.loads(typed("plan", "hits.yaml", "--no-hash", "--json"))["steps"]["d"]
    assert (told["state"], told["fingerprint"], told["unhashed"]) == ("unknown", "", ["input 'two' was not hashed"])
