"""A user's own operator and method, in files beside a pipeline in a folder that no import path knows."""

import json

import pytest

from pipelines.__main__ import main
from pipelines.commands import run

MINE = '''
"""An operator and a method of the user's, with what else Python files have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

import near
from lfm.merging.base import Merge
from operators.artifact import Dataset, Model
from operators.base import Resources, Settings, operator
from operators.workspace import Workspace
from tools.counting import counted


class Case(Enum):
    """How words are written."""

    UPPER = "upper"
    LOWER = "lower"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One replacement."""

    __pydantic_config__ = {"extra": "forbid"}

    old: str
    new: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Style(Settings):
    """What several operators share."""

    case: Case = Case.LOWER
    times: int = 1

    def __post_init__(self) -> None:
        self.require(self.times >= 1, "times", "times >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepNearest(Merge):
    """Keep the expert that is nearest to the base."""

    case: Case = Case.UPPER
    power: float = 2.0
    names: frozenset[str] = field(default=frozenset())

    def __post_init__(self) -> None:
        self.require(self.power > 0, "power", "power > 0")

    def merge(self, name: str, base: Tensor, experts: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        return experts[near.nearest(base, experts, self.power)]


def problems(*, texts, rules, **_):
    if not rules:
        yield "rules: none, expected at least one. Write one."


@operator(resources=Resources(cpus_per_worker=0.5), problems=problems)
def rewrite(
    work: Workspace, *, texts: Sequence[Dataset], rules: Sequence[Rule] = (Rule(old="a"),), style: Style
) -> Dataset:
    """Write texts anew."""
    assert all(isinstance(r, Rule) for r in rules) and isinstance(style.case, Case)
    text = "".join(t.path.read_text() for t in texts)
    for rule in rules:
        text = text.replace(rule.old, rule.new)
    path = work.scratch / "text.txt"
    path.write_text((text.upper() if style.case is Case.UPPER else text) * style.times)
    return work.save(Dataset, path, {"words": counted(text)})
'''
NEAR = '''
"""A file beside it."""

def nearest(base, experts, power):
    """The number of the expert nearest to the base."""
    return int(((experts - base).abs() ** power).flatten(1).sum(dim=1).argmin())
'''
COUNTING = '''
"""A file in a package below it."""

from . import words

def counted(text):
    return len(words.of(text))
'''
PIPELINE = """
name: own
uses: [mine.py]
inputs:
  one: {dataset: ONE}
  base: {model: BASE}
  far: {model: FAR}
steps:
  louder:
    operator: rewrite
    inputs: {texts: [one, one]}
    params: {rules: [{old: hello, new: bye}], case: upper, times: 2}
  merged:
    operator: merge
    inputs: {base: base, experts: [far, base]}
    method: {name: keep_nearest, power: 1, names: [c, a, b]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project of the user's; commands are typed elsewhere."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "project" / "tools").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    project = tmp_path / "project"
    for name, text in {
        "mine.py": MINE,
        "near.py": NEAR,
        "tools/__init__.py": "",
        "tools/counting.py": COUNTING,
        "tools/words.py": "def of(text):\n    return text.split()\n",
        "one.txt": "hello you ",
    }.items():
        (project / name).write_text(text)
    for name, value in (("base", 0.0), ("far", 5.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((2, 3), value)}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    places = {"ONE": project / "one.txt", "BASE": tmp_path / "base", "FAR": tmp_path / "far"}
    text = PIPELINE
    for word, path in places.items():
        text = text.replace(word, str(path))
    (project / "own.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return project


@pytest.fixture
def typed(capsys):
    def type_(*words):
        code = main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return type_


def planned(typed, folder, *words):
    code, out, err = typed("plan", str(folder / "own.yaml"), "--json", *words)
    assert code == 0, err
    return json.loads(out)["steps"]


@pytest.mark.ray
def test_they_run_like_built_in_ones_wherever_the_command_is_typed(typed, folder, ray_local, monkeypatch):
    monkeypatch.setattr(run, "opened", lambda *_: ray_local())
    code, out, err = typed("run", str(folder / "own.yaml"))
    assert code == 0, out + err
    steps = json.loads(typed("show", "last", "--json")[1])["steps"]
    assert {n: s["state"] for n, s in steps.items()} == {"louder": "done", "merged": "done"}
    assert steps["merged"]["method"] == {
        "name": "keep_nearest",
        "case": "upper",
        "power": 1.0,
        "names": ["a", "b", "c"],
    }
    (text,) = (folder.parent / "elsewhere" / ".lfm").rglob("text.txt")
    assert text.read_text() == "BYE YOU BYE YOU " * 2
    assert {s["state"] for s in planned(typed, folder).values()} == {"stored"}


def test_every_file_that_they_import_counts_for_those_steps_that_need_it(typed, folder):
    before = {n: s["fingerprint"] for n, s in planned(typed, folder).items()}

    def changed(name, old, new):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        after = {n: s["fingerprint"] for n, s in planned(typed, folder).items()}
        (folder / name).write_text(text)
        return {n for n in before if before[n] != after[n]}

    assert changed("near.py", "argmin", "argmax") == {"louder", "merged"}, "both stand in one file"
    assert changed("tools/words.py", "split()", "split(' ')") == {"louder", "merged"}
    assert changed("near.py", "A file beside it.", "Another docstring.") == set()
    assert changed("own.yaml", "power: 1", "power: 3") == {"merged"}
    assert changed("own.yaml", "case: upper", "case: lower") == {"louder"}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("case: upper", "case: uper", "11 step 'louder': rewrite: case='uper', expected 'upper' or 'lower'."),
        ("times: 2", "times: 0", "11 step 'louder': rewrite: times=0, expected times >= 1."),
        ("old: hello, new", "odl: hello, new", "11 step 'louder': rewrite needs rules.0.old."),
        ("[{old: hello, new: bye}]", "[]", "11 step 'louder': rules: none, expected at least one. Write one."),
        ("power: 1", "power: -1", "15 step 'merged': KeepNearest: power=-1.0, expected power > 0."),
        ("power: 1", "powr: 1", "15 step 'merged': KeepNearest has no field 'powr'. Did you mean 'power'?"),
        ("keep_nearest", "keep_neares", "15 step 'merged': No merging method is called 'keep_neares'. Did you mean 'k"),
        ("rewrite", "rewrit", "9 step 'louder': No operator is called 'rewrit'. Did you mean 'rewrite' or"),
    ],
)
def test_their_mistakes_are_found_like_those_of_built_in_ones(typed, folder, before, after, said):
    path = folder / "own.yaml"
    path.write_text(path.read_text().lstrip().replace(before, after, 1))
    code, _, err = typed("plan", str(path))
    assert code == 2
    assert err.startswith(f"own.yaml:{said}")
