"""The verb `register`: a model gets a name that stays, a version, and an alias that moves to it."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lfm.errors import LfmError
from operators.artifact import Model
from operators.base import operator
from operators.workspace import Workspace


class BadRegisteredName(LfmError, ValueError):
    """A name or an alias that the registry does not take."""

    def __init__(self, what: str, value: str, allowed: str) -> None:
        super().__init__(what, value, allowed)
        self.what, self.value, self.allowed = what, value, allowed

    def __str__(self) -> str:
        return f"register: {self.what}={self.value!r}, expected {self.allowed}."


def check_name(name: str) -> None:
    """Raise `BadRegisteredName` unless something can be registered as `name`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        allowed = "letters, digits, '.', '_' and '-', a letter or a digit first"
        raise BadRegisteredName("name", name, allowed)


def check_alias(alias: str) -> None:
    """Raise `BadRegisteredName` unless `alias` can point at a version; MLflow takes no dots and not its own words."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", alias):
        raise BadRegisteredName("alias", alias, "letters, digits, '_' and '-'")
    if re.fullmatch(r"latest|v?\d+", alias, re.IGNORECASE):
        raise BadRegisteredName("alias", alias, "a word that could be no version's: not 'latest', '3' or 'v3'")


def _problems(*, name: str, alias: str, **_: Any) -> Iterator[str]:
    for check, value in ((check_name, name), (check_alias, alias)):
        try:
            check(value)
        except BadRegisteredName as problem:
            yield str(problem)


@operator(effect=True, problems=_problems, takes_ensembles=("model",), hands_on="model")
def register(work: Workspace, *, model: Model, name: str, alias: str = "champion") -> Model:
    """Give a model a name, and move an alias of that name to it.

    The same model under the same name keeps its version, however often it is registered.

    Args:
        work: The step's workspace.
        model: What is registered, and handed on unchanged; its ``about`` says as what.
        name: What it is called; each other model of this name is another version.
        alias: What ``name@alias`` means this model from now on.

    Raises:
        BadRegisteredName: The registry does not take the name or the alias.
    """
    check_name(name)
    check_alias(alias)
    version = work.register(model, name, alias)
    return replace(model, about={**model.about, "registered": {"name": name, "version": version, "alias": alias}})
