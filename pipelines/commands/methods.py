"""`lfm methods`: list every method, what it needs and what its fields are."""

import dataclasses
import types
import typing
from argparse import Namespace
from typing import Any, Literal, get_args, get_origin

from rich.table import Table

import lfm
from lfm.catalog import ranges
from lfm.errors import UnknownName
from lfm.method import Method
from pipelines.commands._output import printed, shown


def act(arguments: Namespace) -> int:
    """List every method."""
    families = {n.partition("/")[0] for n in lfm.names()}
    if arguments.family and arguments.family not in families:
        raise UnknownName("family", arguments.family, sorted(families))
    found = [_described(name) for name in lfm.names(arguments.family or None)]
    if arguments.json:
        return printed(found)
    rows = Table("method", "class", "leaf", "reference", "what for", box=None, pad_edge=False, header_style="bold")
    for one in sorted(found, key=lambda m: (m["area"], m["leaf"], m["name"])):
        rows.add_row(one["name"], one["class"], one["leaf"], one["reference"], one["about"])
    shown(rows)
    return 0


def _described(name: str) -> dict[str, Any]:
    method = lfm.find(name)
    return {
        "name": name,
        "family": name.partition("/")[0],
        "class": method.__name__,
        "area": method.area,
        "leaf": method.leaf,
        "reference": method.reference,
        "about": (method.__doc__ or "").strip().partition("\n")[0],
        "needs": dataclasses.asdict(method.needs),
        "fields": _fields(method),
    }


def _fields(method: type[Method]) -> list[dict[str, Any]]:
    """Each field's name, type, range in words and default."""
    hints, allowed = typing.get_type_hints(method), ranges(method)
    return [
        {
            "name": f.name,
            "type": _type(hints[f.name]),
            "range": allowed.get(f.name, _range(hints[f.name])),
            "default": f.default,
        }
        for f in dataclasses.fields(method)  # type: ignore[arg-type]  # every method is one
    ]


def _type(hint: Any) -> str:
    """A type as a pipeline's author would say it."""
    if hint is type(None):
        return "none"
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_type, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0])}"
    name: str = hint.__name__
    return {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}.get(name, name)


def _range(hint: Any) -> str:
    return f"one of {', '.join(map(str, get_args(hint)))}" if get_origin(hint) is Literal else f"any {_type(hint)}"
