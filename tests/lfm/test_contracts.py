"""What every method in the file tree keeps."""

import dataclasses
import pickle
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

import lfm
from lfm.errors import HyperparameterError, UnknownName

ROOT = Path(__file__).resolve().parents[2]
NAMES = lfm.names()


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
    assert method.area in ("tuning", "distillation", "reuse", "meta", "editing")
    assert method.leaf == "base" or re.match(r"[A-E]\d[a-z]?$", method.leaf)


@pytest.mark.parametrize("name", NAMES)
def test_it_survives_yaml_and_pickle(name):
    method = lfm.find(name)
    made = method()
    fields = yaml.safe_load(yaml.safe_dump(TypeAdapter(method).dump_python(made, mode="json")))
    assert TypeAdapter(method).validate_python(fields) == made
    assert pickle.loads(pickle.dumps(made)) == made


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
