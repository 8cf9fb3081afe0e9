"""The README does what it says."""

import json
import re
import runpy
import sys

import pytest

from pipelines.__main__ import main
from pipelines.commands import run
from pipelines.files import RECIPES
from tests.house.readme import README, blocks, filled


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with the README's files."""
    first, _, own = blocks("yaml")
    (tmp_path / "first.yaml").write_text(first)
    (tmp_path / "own.yaml").write_text(own)
    files = ("my_methods.py", "test_my_methods.py", "my_steps.py")
    for name, text in zip(files, blocks("python"), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_generated_parts_are_current(folder):
    """All but fingerprints, which change with every line of code; `make docs` writes it anew."""

    def plain(text):
        return re.sub(r"\b[0-9a-f]{12}\b", "x", text)

    assert plain(filled(README.read_text(), folder / "first.yaml")) == plain(README.read_text())


def test_what_it_shows_of_a_recipe_is_the_recipe_s():
    _, middle, _ = blocks("yaml")
    assert middle in (RECIPES / "edit_merge_distill_serve.yaml").read_text()


def test_a_method_of_ones_own_passes_its_test(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    runpy.run_path("test_my_methods.py")["test_an_outlier_changes_nothing"]()
    monkeypatch.delitem(sys.modules, "my_methods")


@pytest.mark.ray
def test_its_pipelines_run_with_a_method_and_an_operator_of_ones_own(folder, ray_local, monkeypatch, capsys):
    monkeypatch.setattr(run, "opened", lambda *_: ray_local())
    assert main(["run", "first.yaml"]) == 0
    assert main(["run", "own.yaml"]) == 0
    capsys.readouterr()
    assert main(["show", "last", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert (steps["merged"]["state"], steps["merged"]["method"]) == ("done", {"name": "median", "scale": 0.5})
    assert (steps["short"]["state"], steps["short"]["params"]) == ("done", {"longest": 120})
    assert steps["measured"]["data"]["about"]["sets"]["short"]["documents"] == 64

    (folder / "own.yaml").write_text((folder / "own.yaml").read_text().replace("scale: 0.5", "scale: -1"))
    assert main(["plan", "own.yaml"]) == 2
    assert "Median: scale=-1.0, expected scale > 0." in capsys.readouterr().err
