"""Every method of a family, in every way that its fields' words allow: what the tests of families go through."""

import dataclasses
import itertools
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest

import lfm
from lfm.errors import HyperparameterError
from lfm.method import Method


def every(family: str) -> list[Any]:
    """Parameters of a test: each method as it is by default, and with each other word or switch that it has."""
    found = []
    for name in lfm.names(family):
        for said, made in variants(lfm.find(name)):
            found.append(pytest.param(made, id=" ".join([name.partition("/")[2], *said])))
    return found


def variants(method: type[Method]) -> Iterator[tuple[list[str], Method]]:
    """A method's instances that differ from the default in one or two fields, each with what it says of these.

    Fields that take words or yes and no are set to all that they take, those that take a number for each of two models
    to such numbers; what the method refuses is left out.
    """
    hints = typing.get_type_hints(method)
    fields = {f.name: f.default for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    changes = [{}, *({n: v} for n, default in fields.items() for v in _values(hints[n]) if v != default)]
    seen = set()
    for one, other in itertools.combinations_with_replacement(changes, 2):
        change = {**one, **other}
        said = [f"{name}={value}" for name, value in sorted(change.items())]
        if (key := tuple(said)) in seen:
            continue
        seen.add(key)
        try:
            yield said, method(**change)
        except HyperparameterError:
            continue


def _values(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif hint is bool:
        yield from (True, False)
    elif get_origin(hint) in (typing.Union, types.UnionType):
        for one in get_args(hint):
            yield from _values(one)
    elif get_origin(hint) is tuple and get_args(hint) == (float, ...):
        yield (0.75, 0.5)
