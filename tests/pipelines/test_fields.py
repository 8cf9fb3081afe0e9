"""Parameters are the same values whether Python gave objects or YAML gave mappings."""

import dataclasses
import json
import typing

import pytest

from operators.catalog import Catalog
from pipelines.fields import parameters_of

CATALOG = Catalog()


def nested(hint):
    """The dataclasses inside of a type."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for inner in typing.get_args(hint) for found in nested(inner)]


NESTED = [
    (verb.name, key, cls)
    for verb in map(CATALOG.operator, CATALOG.verbs())
    for key, parameter in verb.params.items()
    for cls in nested(parameter.hint)
]
GIVEN = {
    "LoRA": {"rank": 2, "alpha": 32},
    "Network": {"widths": [4]},
    "Requirement": {"better": "a", "than": 1, "on": "b"},
    "Dimension": {"uniform": [0, 1]},
    "Objective": {"measure": "loss", "direction": "minimize"},
    "Stop": {"step": "tuned", "first": 1, "last": 9},
    "Population": {"step": "tuned", "every": 1, "last": 9},
    "Change": {"at": 3, "values": {"learning_rate": 0.1}},
}


def test_there_are_parameters_that_are_objects():
    assert {cls.__name__ for _, _, cls in NESTED} == GIVEN.keys()


@pytest.mark.parametrize(("verb", "key", "cls"), NESTED)
def test_an_object_given_in_python_is_what_yaml_gives(verb, key, cls):
    fields = GIVEN[cls.__name__]
    hint = str(CATALOG.operator(verb).params[key].hint)
    many = [0] if "Sequence" in hint or "tuple" in hint else ["x"] if "Mapping" in hint else []
    both = [[one] if many == [0] else {"x": one} if many else one for one in (fields, cls(**fields))]
    read = [parameters_of(CATALOG.operator(verb), {key: one})[0].get(key) for one in both]
    if None in read:  # the verb needs more than this
        read = [CATALOG.operator(verb).params[key].adapter.validate_python(one) for one in both]
        read = [dataclasses.asdict(r[many[0]] if many else r) for r in read]
    first, second = map(json.dumps, read)
    assert first == second
