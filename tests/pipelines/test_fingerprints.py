"""The cache is never wrong: which edits change which steps' fingerprints, and which change none."""

import ast
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from operators.catalog import Catalog, _built_in
from operators.code import OURS, Code
from pipelines import libraries, source
from pipelines.__main__ import ROOT, main
from pipelines.beginning import described
from pipelines.files import opened
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Event, Journal
from pipelines.plan import of_run, pinned
from pipelines.source import pack, reach
from pipelines.spec import load
from pipelines.store import Result
from tests.pipelines.edits import COUNTED, EDITS, FILES, SHAPED, added, replaced, yaml


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A user's folder, with a copy of this project's code that may be edited too."""
    folder = tmp_path_factory.mktemp("template") / "project"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for ours in ("lfm", "operators"):
        shutil.copytree(source.ROOT / ours, folder / "ours" / ours, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def folder(template, tmp_path, monkeypatch):
    copy = tmp_path / "project"
    shutil.copytree(template, copy, copy_function=shutil.copy)
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(copy / "site")
    monkeypatch.setattr(source, "ROOT", copy / "ours")
    return copy


def planned():
    libraries._installed.cache_clear()
    found = opened("edits.yaml")
    assert found.problems == ()
    return pinned(found.spec, Looks(Path("inputs.sqlite"), store=None), found.catalog)


def fingerprints():
    return {n: s.fingerprint for n, s in planned().steps.items()}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_the_fingerprints_that_it_may_change_and_no_other(folder, name):
    edit, expected = EDITS[name]
    before = fingerprints()
    edit(folder)
    after = set(fingerprints().values())
    assert {n for n, fingerprint in before.items() if fingerprint not in after} == expected


@pytest.mark.parametrize(
    ("name", "step", "differing"),
    [
        ("a helper two modules away", "shaped", {"source.tools.counting"}),
        ("what a package's __init__ imports", "shaped", {"source.tools.start"}),
        ("an import more", "alone", {"source.other", "source.unused"}),
        ("what a built-in operator imports", "prepared", {"source.operators.data.row_files"}),
        ("a library's version", "shaped", {"libraries.fancy"}),
        ("a library that is gone", "shaped", {"libraries.loose"}),
        ("as many other bytes at the same time", "prepared", {"inputs.data[0]"}),
        ("a parameter", "shaped", {"params.size"}),
        ("a parameter", "counted", {"inputs.after[0]"}),
        ("a method's field", "shaped", {"method[1].by"}),
        ("the order of inputs by name", "shaped", {"order.inputs.sets"}),
        ("the order of a parameter's keys", "shaped", {"order.params.words"}),
        ("the accelerator", "counted", {"accelerator"}),
    ],
)
def test_why_names_what_differs_whatever_was_edited(folder, store, capsys, name, step, differing):
    for made in planned().steps.values():
        store.commit(Result(fingerprint=made.fingerprint, kind=made.kind, digest="d", run="before", step=made.name,
                            components=made.components))  # fmt: skip
    EDITS[name][0](folder)
    made = planned()
    journal = Journal.claim(store.storage, "now")
    journal.write([Event("started", data={"steps": {n: described(made, n) for n in made.steps}, "forced": []})])
    journal.write([Event("start", step), Event("commit", step, {"digest": "e"})])
    assert main(["why", "now", step, "--store", store.storage.uri, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["nearest"], set(told["changed"])) == ({"run": "before", "step": step}, differing)
    assert main(["why", "now", step, "--store", store.storage.uri]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{step}: done; differs from step {step!r} of run before in:"
    assert {line.split()[0].rstrip(":") for line in lines} == differing


def test_docstrings_count_where_code_reads_some(folder):
    replaced("lazy.py", "WHEN = 'late'", "import near\nWHEN = near.helper.__doc__")(folder)
    before = fingerprints()
    replaced("near.py", "def helper(*x):", "def helper(*x):\n    'Help.'")(folder)
    after = fingerprints()
    assert {n for n in before if before[n] != after[n]} == SHAPED


def test_a_file_that_is_used_brings_the_packages_that_it_lies_in(folder):
    brought = [name for name, _ in pack(folder, ("tools/words.py",)).files]
    assert brought == ["tools/__init__.py", "tools/start.py", "tools/words.py"]


def test_what_a_function_made_is_decided_by_whoever_called_it(folder):
    replaced("other.py", "@operator()\ndef", "def made(extra):\n @operator()\n def")(folder)
    replaced("other.py", "    return sum(1", "  return sum(extra")(folder)
    added("other.py", f"{(folder / 'other.py').read_text()} return count\n")(folder)
    added("third.py", "import other\ncount = other.made(1)\n")(folder)
    yaml("[mine.py, other.py]", "[mine.py, third.py]")(folder)
    before = fingerprints()
    replaced("third.py", "made(1)", "made(2)")(folder)
    after = fingerprints()
    assert {n for n in before if before[n] != after[n]} == COUNTED


@pytest.mark.parametrize(
    "unnamed",
    [
        "import_module('ne' + 'ar')",
        "__import__(name)",
        "importlib.import_module('.near', other)",
        "exec(open('near.py').read())",
        "import runpy",
        "from runpy import run_path",
        "from importlib import import_module as load",
        "util.spec_from_file_location('near', 'near.py')",
    ],
)
def test_code_that_no_import_names_keeps_a_step_from_being_reused_in_another_run(folder, unnamed):
    added("named.py", f"def said(name, other):\n    {unnamed}\n")(folder)
    made = planned()
    assert {n: s.unhashed for n, s in made.steps.items() if s.unhashed} == {
        "shaped": ("named.py:2 runs code that no import names",),
        "counted": ("step 'shaped' has none",),
    }
    assert {n for n, s in made.steps.items() if not s.fingerprint} == SHAPED
    one, again, other = (of_run(made, run).steps for run in ("one", "one", "other"))
    assert one == again
    assert {n for n in one if one[n].fingerprint != other[n].fingerprint} == SHAPED
    assert len({s.fingerprint for s in one.values()}) == len(one)


def test_the_version_of_python_counts_for_every_step(folder, monkeypatch):
    before = fingerprints()
    other = SimpleNamespace(version_info=(3, 99), stdlib_module_names=sys.stdlib_module_names)
    monkeypatch.setattr(source, "sys", other)
    assert set(before.values()).isdisjoint(fingerprints().values())


def keys_of(interpreters):
    """The fingerprints that so many fresh interpreters tell, two at a time, each with a hash seed of its own."""

    def plan(seed):
        code = "import sys\nfrom pipelines.__main__ import main\nmain(['plan', 'edits.yaml', '--json'])\n"
        done = subprocess.run(
            [sys.executable, "-c", f"{code}print('torch' in sys.modules)"],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": f"{ROOT}{os.pathsep}{Path.cwd() / 'site'}"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        told, torch = done.stdout.strip().rsplit("\n", 1)
        assert torch == "False", "planning what needs no torch imports it"
        return {n: s["fingerprint"] for n, s in json.loads(told)["steps"].items()}

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(plan, range(1, interpreters + 1)))


@pytest.mark.slow
def test_fresh_interpreters_tell_one_fingerprint_without_torch(folder):
    assert keys_of(20) == [fingerprints()] * 20


@pytest.mark.soak
def test_a_hundred_fresh_interpreters_tell_one_fingerprint(folder):
    assert keys_of(100) == [fingerprints()] * 100


def test_packages_of_this_project_hold_no_logic():
    """Which is why a fingerprint leaves them out."""
    for ours in OURS:
        for file in (source.ROOT / ours).rglob("__init__.py"):
            for statement in ast.parse(file.read_text()).body:
                assert isinstance(statement, ast.ImportFrom | ast.Expr), f"{file}: {ast.unparse(statement)}"


def test_built_in_operators_run_no_code_that_no_import_names_but_the_user_s():
    """Which `operators.code` imports, and which counts for itself; what the catalogues find by name the plan counts."""
    found = set()
    for module in reach(tuple(_built_in().values()), Code()).modules:
        file = source._file(module, source.ROOT)
        if source._scan(file.read_text(), module, package=file.name == "__init__.py").unnamed:
            found.add(module)
    assert found == {"lfm.catalog", "operators.catalog", "operators.code"}


def test_what_a_step_reads_of_a_memory_or_an_adapter_is_part_of_its_fingerprint():
    """Its file names the method that reads it: nobody imports that."""
    text = """
name: p
inputs: {model: {model: "hf://a/b"}, notes: {memory: "lfm://x"}, small: {adapter: "lfm://y"}, text: {dataset: "t"}}
steps:
  plain: {operator: evaluate, inputs: {model: model, data: {a: text}}}
  reminded: {operator: evaluate, inputs: {model: model, memory: notes, data: {a: text}}}
  adapted: {operator: evaluate, inputs: {model: small, base: model, data: {a: text}}}
"""

    class Blind:
        def check(self, artifact):
            return None

        def pin(self, artifact):
            return replace(artifact, digest="d" * 64)

    steps = pinned(load(text), Blind(), Catalog()).steps
    source_of = {name: set(step.components["source"]) for name, step in steps.items()}
    assert "lfm.memory.grace" in source_of["reminded"] - source_of["plain"]
    assert {"lfm.tuning.bottleneck_adapter", "lfm.tuning.prefix"} <= source_of["adapted"] - source_of["plain"]
