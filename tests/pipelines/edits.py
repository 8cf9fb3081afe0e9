"""A user's folder, and edits of it with the steps whose fingerprints they change."""

import os

FILES = {
    "edits.yaml": """
name: edits
uses: [mine.py, other.py]
inputs:
  text: {dataset: one.jsonl}
  folder: {dataset: rows}
  weights: {model: weights}
steps:
  shaped:
    operator: shape
    inputs: {data: text, sets: {y: folder, x: text}}
    method: {name: scale, by: 2}
    params: {size: 3, words: {b: 1, a: 2}}
  counted:
    operator: count
    inputs: {after: [shaped, text]}
  alone: {operator: count, inputs: {after: [folder]}, params: {size: 2}}
  prepared: {operator: prepare, inputs: {data: text}}
  registered: {operator: register, inputs: {model: weights}, params: {name: it}}
""",
    "mine.py": '''
"""What a user wrote."""
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import deep.inner as inner
import near
from lfm.method import Method
from operators.artifact import Dataset
from operators.base import Resources, operator
from operators.workspace import Workspace
from stars import *

if sys.platform == "none":
    import rare

@dataclass(frozen=True, kw_only=True, slots=True)
class Scale(Method):
    """A method."""
    by: float = 1.0
    """By how much."""
    names: frozenset[str] = frozenset({"x", "y", "z"})

@operator(resources=Resources(cpus_per_worker=0.5))
def shape(
    work: Workspace, *, data: Dataset, sets: Mapping[str, Dataset], method: Scale, size: int = 1,
    words: Mapping[str, int] = {}, step: float = 0.5,
) -> Dataset:
    """Shape it."""
    import lazy
    import fancy, loose
    named = import_module("named")
    return near.helper(size, 'text', named, lazy)  # a comment
''',
    "near.py": "from tools.counting import counted\n\nLIMIT = 3\n\ndef helper(*x):\n    return x\n\n"
    "def unused():\n    pass\n",
    "tools/__init__.py": '"""Tools."""\nfrom .start import BEGIN\n\nSCALE = 2\n',
    "tools/start.py": "BEGIN = 1\n",
    "tools/counting.py": "from . import words\n\ndef counted(text):\n    return words.of(text)\n",
    "tools/words.py": "def of(text):\n    return text.split()\n",
    "deep/__init__.py": '"""Deep."""\n',
    "deep/inner.py": "DEPTH = 1\n",
    "lazy.py": "WHEN = 'late'\n",
    "rare.py": "WHERE = 'elsewhere'\n",
    "stars.py": "STARS = 5\n",
    "named.py": "def said():\n    '''Say.'''\n    return 'said'\n",
    "unused.py": "NOBODY = 1\n",
    "other.py": """
from collections.abc import Sequence
from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace

@operator()
def count(work: Workspace, *, after: Sequence[Dataset], size: int = 1) -> Dataset:
    return sum(1 for _ in after)
""",
    "one.jsonl": '{"text": "some"}\n',
    "rows/one.jsonl": '{"text": "more"}\n',
    "weights/config.json": "{}",
    "weights/model.safetensors": "\x02\0\0\0\0\0\0\0{}",
    "site/fancy.py": "",
    "site/fancy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: fancy\nVersion: 1.0\n",
    "site/loose.py": "TIGHT = False\n",
}


def replaced(name, old, new):
    def edit(folder):
        text = (folder / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        (folder / name).write_text(text.replace(old, new))

    return edit


def yaml(old, new):
    return replaced("edits.yaml", old, new)


def added(name, text):
    return lambda folder: (folder / name).write_text(text)


def both(*edits):
    def edit(folder):
        for one in edits:
            one(folder)

    return edit


def moved(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def gone(name):
    return lambda folder: (folder / name).unlink()


def other_bytes(folder):
    """As many, and the file is as old as before."""
    file = folder / "one.jsonl"
    before = file.stat()
    file.write_text(file.read_text().replace("some", "same"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


NONE: set[str] = set()
SHAPED = {"shaped", "counted"}
COUNTED = {"counted", "alone"}
OWN = SHAPED | COUNTED
ALL = {*OWN, "prepared", "registered"}

EDITS = {
    # the user's code
    "a constant one module away": (replaced("near.py", "LIMIT = 3", "LIMIT = 4"), SHAPED),
    "a helper two modules away": (replaced("tools/counting.py", "of(text)", "of(text[1:])"), SHAPED),
    "what that imports by a relative name": (replaced("tools/words.py", "split()", "split(' ')"), SHAPED),
    "logic in a package's __init__": (replaced("tools/__init__.py", "SCALE = 2", "SCALE = 3"), SHAPED),
    "a package's docstring": (replaced("tools/__init__.py", "Tools.", "All tools."), NONE),
    "what a package's __init__ imports": (replaced("tools/start.py", "1", "2"), SHAPED),
    "logic in a package that had none": (replaced("deep/__init__.py", '"""Deep."""', "import site"), SHAPED),
    "a package's docstring that goes": (added("deep/__init__.py", ""), NONE),
    "import a.b as c": (replaced("deep/inner.py", "1", "2"), SHAPED),
    "a lazy import": (replaced("lazy.py", "late", "later"), SHAPED),
    "an import under a condition": (replaced("rare.py", "else", "any"), SHAPED),
    "a star import": (replaced("stars.py", "5", "6"), SHAPED),
    "import_module of a name": (replaced("named.py", "return", "yield"), SHAPED),
    "a file that nobody imports": (replaced("unused.py", "1", "2"), NONE),
    "a file more": (added("more.py", "import near\n"), NONE),
    "the operator": (replaced("mine.py", "'text'", "'texts'"), SHAPED),
    "another operator": (replaced("other.py", "sum(1", "sum(2"), COUNTED),
    "a comment": (replaced("mine.py", "# a comment", "# another"), NONE),
    "a module's docstring": (replaced("mine.py", "What a user wrote.", "What she wrote."), NONE),
    "an operator's docstring": (replaced("mine.py", '"""Shape it."""', '"""Shape."""'), NONE),
    "an attribute's docstring": (replaced("mine.py", '"""By how much."""', ""), NONE),
    "a docstring where there was none": (replaced("near.py", "(*x):\n", "(*x):\n    '''Help.'''\n"), NONE),
    "a body that becomes a docstring": (replaced("near.py", "    pass", "    '''Nothing.'''"), NONE),
    "quotes, parentheses and blank lines": (
        replaced("mine.py", "return near.helper(size, 'text',", 'return (\n\n        near.helper)(size, u"text",'),
        NONE,
    ),
    "another line ending": (replaced("near.py", "\n", "\r\n"), NONE),
    "a decorator's argument": (replaced("mine.py", "cpus_per_worker=0.5", "cpus_per_worker=0.25"), SHAPED),
    "an annotation": (replaced("other.py", "size: int = 1", "size: float = 1"), COUNTED),
    "a default that the step leaves out": (replaced("mine.py", "step: float = 0.5", "step: float = 0.6"), SHAPED),
    "a function that nobody calls": (replaced("near.py", "def unused():\n    pass\n", ""), SHAPED),
    "a module that is imported no more": (
        both(replaced("tools/__init__.py", "from .start import BEGIN\n", ""), gone("tools/start.py")),
        SHAPED,
    ),
    "an import more": (replaced("other.py", "\nfrom coll", "\nimport unused\nfrom coll"), COUNTED),
    # libraries
    "a library's version": (
        replaced("site/fancy-1.0.dist-info/METADATA", "Version: 1.0", "Version: 1.1"),
        SHAPED,
    ),
    "a library without a version": (replaced("site/loose.py", "False", "True"), SHAPED),
    "a library that is edited where it lies": (
        both(
            added("site/fancy-1.0.dist-info/direct_url.json", '{"dir_info": {"editable": true}}'),
            replaced("site/fancy.py", "", "pass"),
        ),
        SHAPED,
    ),
    "a library that is gone": (gone("site/loose.py"), SHAPED),
    # inputs
    "as many other bytes at the same time": (other_bytes, {*SHAPED, "prepared"}),
    "an input's time": (lambda folder: os.utime(folder / "one.jsonl", (1, 1)), NONE),
    "an input's file has another name": (both(moved("one.jsonl", "two.jsonl"), yaml("one.jsonl", "two.jsonl")), NONE),
    "an input's file ends in something else": (
        both(moved("one.jsonl", "one.json"), yaml("one.jsonl", "one.json")),
        {*SHAPED, "prepared"},
    ),
    "an input's folder has another name": (both(moved("rows", "r.ows"), yaml("rows}", "r.ows}")), NONE),
    "a file more in a folder": (added("rows/two.jsonl", "{}\n"), OWN),
    "a file of a folder has another name": (moved("rows/one.jsonl", "rows/two.jsonl"), OWN),
    "a hidden file in a folder": (added("rows/.two.jsonl", "{}\n"), NONE),
    # the pipeline
    "a parameter": (yaml("size: 3", "size: 4"), SHAPED),
    "a parameter of a step that nothing follows": (yaml("size: 2", "size: 4"), {"alone"}),
    "a default spelled out": (yaml("size: 3,", "size: 3, step: 0.5,"), NONE),
    "a default of a built-in operator spelled out": (yaml("{data: text}}", "{data: text}, params: {part: all}}"), NONE),
    "the order of keys": (
        both(
            yaml("operator: shape\n    inputs: {data: text, ", "inputs: {"),
            yaml("x: text}}\n", "x: text}, data: text}\n    operator: shape\n"),
        ),
        NONE,
    ),
    "the order of inputs in a list": (yaml("[shaped, text]", "[text, shaped]"), {"counted"}),
    "the order of inputs by name": (yaml("{y: folder, x: text}", "{x: text, y: folder}"), SHAPED),
    "the names of inputs by name": (yaml("{y: folder, x: text}", "{z: folder, x: text}"), SHAPED),
    "the order of a parameter's keys": (yaml("{b: 1, a: 2}", "{a: 2, b: 1}"), SHAPED),
    "a method's field": (yaml("by: 2", "by: 3"), SHAPED),
    "a method's field as another number that is the same": (yaml("by: 2", "by: 2.0"), NONE),
    "a method's default spelled out": (yaml("by: 2", "by: 2, names: [z, x, y]"), NONE),
    "a step's name": (both(yaml("shaped:", "formed:"), yaml("[shaped,", "[formed,")), NONE),
    "an input's name": (
        both(yaml("  folder:", "  lines:"), yaml("[folder]", "[lines]"), yaml("y: folder", "y: lines")),
        NONE,
    ),
    "the pipeline's name": (yaml("name: edits", "name: changes"), NONE),
    "a step more": (yaml("  alone:", "  more: {operator: count, inputs: {after: [text]}}\n  alone:"), NONE),
    "resources that do not decide": (
        yaml("counted:\n", "counted:\n    resources: {cpus_per_worker: 3, memory: 5000, timeout: 60}\n"),
        NONE,
    ),
    "the accelerator": (
        yaml("counted:\n", "counted:\n    resources: {accelerator: H100, gpus_per_worker: 1}\n"),
        {"counted"},
    ),
    # this project
    "what every operator is made of": (replaced("ours/operators/base.py", "Problems = ", "Problem = Problems = "), ALL),
    "what every method is made of": (replaced("ours/lfm/errors.py", "class ", "ONE = 1\n\n\nclass "), ALL),
    "a built-in operator": (replaced("ours/operators/preparation.py", '"held_out"', '"held"'), {"prepared"}),
    "what a built-in operator imports": (
        replaced("ours/operators/data/row_files.py", '".parquet"', '".pq"'),
        {"prepared"},
    ),
    "a comment in a built-in operator": (replaced("ours/operators/preparation.py", "\nimport", "\n# x\nimport"), NONE),
    "a built-in operator that no step names": (replaced("ours/operators/merging.py", "import json", "import os"), NONE),
}  # fmt: skip
