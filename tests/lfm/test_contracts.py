"""What every method in the file tree keeps."""

import dataclasses
import json
import pickle
import re
import typing
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

import lfm
from lfm.catalog import ranges
from lfm.errors import HyperparameterError, UnknownName
from lfm.method import STRATEGIES, Needs
from lfm.statistics import KINDS
from tests.lfm.variants import variants

ROOT = Path(__file__).resolve().parents[2]
NAMES = lfm.names()
FAMILIES = sorted({name.partition("/")[0] for name in NAMES})
LEAVES = {
    "tuning": ("A1a", "A1b", "A2a", "A2b", "A3a", "A3b"),
    "distillation": ("B1", "B2", "B3"),
    "reuse": ("C1", "C2a", "C2b", "C2c", "C2d"),
    "meta": ("D1", "D2"),
    "editing": ("E1", "E2a", "E2b", "E2c"),
}
"""The survey's areas and their leaves."""


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_frozen_dataclass_with_keywords_only(name):
    method = lfm.find(name)
    made = method()
    assert dataclasses.is_dataclass(method)
    assert not hasattr(made, "__dict__"), "slots=True"
    with pytest.raises(TypeError):
        method(1)
    for field in dataclasses.fields(method)[:1]:
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
            setattr(made, field.name, 1)


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_cites_its_reference(name):
    method = lfm.find(name)
    assert re.match(r"arXiv:\d{4}\.\d{4,5}$|10\.|https://", method.reference)
    assert method.reference.removeprefix("arXiv:") in method.__doc__
    assert "Reference:" in method.__doc__
    assert re.search(r"As in the paper\.|Differs from the paper:", method.__doc__)
    for field in dataclasses.fields(method):
        assert re.search(rf"^\s+{field.name}: ", method.__doc__, re.MULTILINE), f"{field.name} is not documented"


@pytest.mark.parametrize("name", NAMES)
def test_it_has_its_place_in_the_survey(name):
    method = lfm.find(name)
    assert method.leaf == "base" or method.leaf in LEAVES[method.area]


@pytest.mark.parametrize("name", NAMES)
def test_what_it_needs_is_said_in_known_words_and_is_what_its_family_needs_at_least(name):
    needs, family = lfm.find(name).needs, lfm.find(name).__mro__[1].needs
    for field, hint in typing.get_type_hints(Needs).items():
        words = typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal:
            assert getattr(needs, field) in words
    assert set(needs.statistics) <= set(KINDS)
    assert set(needs.strategies) <= set(STRATEGIES)
    assert len({*needs.statistics}) == len(needs.statistics)
    least, most = needs.models
    assert 1 <= least <= (least if most is None else most)
    assert set(needs.strategies) <= set(family.strategies)
    assert set(family.statistics) <= set(needs.statistics)
    assert family.architecture in ("any", needs.architecture)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_survives_yaml_json_and_pickle(name):
    method = lfm.find(name)
    for said, made in variants(method):
        plain = TypeAdapter(method).dump_python(made, mode="json")
        assert TypeAdapter(method).validate_python(yaml.safe_load(yaml.safe_dump(plain))) == made, said
        assert TypeAdapter(method).validate_python(json.loads(json.dumps(plain))) == made, said
        assert pickle.loads(pickle.dumps(made)) == made, said
        assert hash(made) == hash(method(**made.hyperparameters())), said


@pytest.mark.parametrize("name", NAMES)
def test_ranges_are_of_its_own_fields_and_hold_for_its_defaults(name):
    method = lfm.find(name)
    assert ranges(method).keys() <= {f.name for f in dataclasses.fields(method)}
    assert all(allowed for allowed in ranges(method).values())
    with pytest.raises(TypeError):
        method(no_such_field=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_family_has_tests_that_every_method_passes_by_being_there(family):
    assert (ROOT / "tests" / "lfm" / family / "test_family.py").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_test_of_its_own(name):
    family, _, stem = name.partition("/")
    assert (ROOT / "tests" / "lfm" / family / f"test_{stem}.py").is_file()


def test_an_unknown_name_has_near_ones():
    with pytest.raises(UnknownName, match="Did you mean 'distillation/forward_kl'"):
        lfm.find("distillation/forwrd_kl")


def test_errors_are_rebuilt_from_their_arguments():
    for error in (UnknownName("method", "x", ("a",)), HyperparameterError("M", "f", 1, "f > 1")):
        assert str(type(error)(*error.args)) == str(error)
