"""Recipes that come along: each exists as YAML and as Python, and both are the same."""

import importlib
from pathlib import Path

import pytest

from operators.catalog import Catalog
from pipelines import files, recipes
from pipelines.files import RECIPES, opened
from pipelines.inputs.inspector import Looks
from pipelines.plan import plan
from pipelines.spec import trace
from tests.operators.small import saved

NAMES = sorted(p.stem for p in RECIPES.glob("*.yaml"))


@pytest.fixture
def looks(store):
    return Looks(Path(store.storage.uri) / "inputs.sqlite", store)


@pytest.mark.parametrize("name", NAMES)
def test_yaml_and_python_give_one_spec_and_one_fingerprint(name, looks):
    from_yaml = opened(name)
    assert from_yaml.problems == ()
    module = importlib.import_module(f"{recipes.__name__}.{name}")
    from_python = trace(getattr(module, name))
    assert from_python == from_yaml.spec
    one, other = (plan(spec, looks, Catalog()) for spec in (from_yaml.spec, from_python))
    assert {n: s.fingerprint for n, s in one.steps.items()} == {n: s.fingerprint for n, s in other.steps.items()}
    assert all(s.fingerprint for s in one.steps.values())


def test_a_teacher_from_elsewhere_takes_the_pretrain_step_out_of_the_plan(looks, tmp_path):
    model = saved(tmp_path / "model", max_position_embeddings=256)
    changes = (f"teacher={model.uri}", f"student={model.uri}")
    changed = opened("distill_lora_merge_serve", changes=changes)
    assert changed.problems == ()
    made = plan(changed.spec, looks, changed.catalog)
    assert "pretrain" not in {s.operator for s in made.steps.values()}
    assert made.inputs["teacher"].digest == made.inputs["student"].digest
    before = plan(opened("distill_lora_merge_serve").spec, looks, Catalog())
    assert set(before.steps) - set(made.steps) == {"teacher", "student"}


def test_every_recipe_is_found_by_its_name():
    assert NAMES == ["distill_lora_merge_serve", "edit_merge_distill_serve"]
    assert Path(recipes.__file__).parent == files.RECIPES
