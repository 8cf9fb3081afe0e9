"""Find an operator or a method by its name: in this project's file tree, or in the files that a pipeline brings."""

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import lfm
from lfm.errors import UnknownName
from lfm.method import Method
from operators.artifact import Adapter, Artifact, Datastore, Memory
from operators.base import Operator

READ_BY_NAME: Mapping[type[Artifact], str] = {Adapter: "tuning", Datastore: "retrieval", Memory: "memory"}
"""The kinds whose files name the method that reads them, and its family: so a step that is given one depends on it."""
ENSEMBLES = "ensembling"
"""The family of the methods that a model's files name: a step depends on it where its verb takes such models."""


@dataclass(frozen=True)
class Catalog:
    """Every verb and method that one pipeline can name.

    Attributes:
        modules: The user's own modules, as `operators.code.bring` returns them.
    """

    modules: Sequence[ModuleType] = ()
    _own: Mapping[str, Operator[Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        own = {v.name: v for m in self.modules for v in vars(m).values() if isinstance(v, Operator)}
        object.__setattr__(self, "_own", own)

    @property
    def has_own(self) -> bool:
        """Whether the user's modules define an operator or a method."""
        return bool(self._own or self._classes())

    def verbs(self) -> tuple[str, ...]:
        """All operators' names, sorted."""
        return tuple(sorted({*_built_in(), *self._own}))

    def operator(self, verb: str) -> Operator[Any]:
        """Import what defines the operator `verb` and return it; the user's own comes first.

        Raises:
            UnknownName: No such verb.
        """
        if verb in self._own:
            return self._own[verb]
        if verb not in _built_in():
            raise UnknownName("operator", verb, self.verbs())
        found: Operator[Any] = getattr(importlib.import_module(_built_in()[verb]), verb)
        return found

    def methods(self, family: type[Method]) -> tuple[str, ...]:
        """The names of all methods of a family, sorted."""
        own = [method_name(c) for c in self._classes() if issubclass(c, family)]
        built_in = [n.partition("/")[2] for n in lfm.names(family_name(family))]
        return tuple(sorted({*own, *built_in}))

    def method(self, family: type[Method], name: str) -> type[Method]:
        """Import what defines the method and return its class; the user's own comes first.

        Raises:
            UnknownName: The family has no such method.
        """
        for found in self._classes():
            if issubclass(found, family) and method_name(found) == name:
                return found
        if f"{family_name(family)}/{name}" not in lfm.names():
            raise UnknownName(f"{family_name(family)} method", name, self.methods(family))
        return lfm.find(f"{family_name(family)}/{name}")

    def _classes(self) -> list[type[Method]]:
        """The user's methods: classes of theirs from which none of theirs is derived, which would make it a family."""
        found = [
            c
            for m in self.modules
            for c in vars(m).values()
            if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == m.__name__
        ]
        return [c for c in found if not any(other is not c and issubclass(other, c) for other in found)]


def family_name(family: type[Method]) -> str:
    """``merging`` for `Merge`, which is defined in ``lfm.merging.base``."""
    return family.__module__.split(".")[-2] if family.__module__.startswith("lfm.") else family.__module__


def method_name(method: type[Method]) -> str:
    """``ties`` for `TIES` in ``lfm/merging/ties.py``; the class in lower snake for one of the user's own."""
    if method.__module__.startswith("lfm."):
        return method.__module__.rpartition(".")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", method.__name__).lower()


@functools.cache
def _built_in() -> dict[str, str]:
    """Verb -> module, read off this folder without importing any of it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "operator"
                for d in node.decorator_list
            ):
                found[node.name] = f"operators.{path.stem}"
    return found
