"""``--set A.B=VALUE``: a pipeline as plain values -> the same with one thing changed."""

from collections.abc import Mapping
from typing import Any

from lfm.errors import LfmError
from operators.artifact import kind_of
from operators.base import Resources
from operators.catalog import Catalog
from pipelines.problems import Place, Places, Problem, near, shown
from pipelines.steps import method_fields
from pipelines.text import Text

SECTIONS = ("inputs", "method", "params", "resources")


class _Refused(LfmError, ValueError):
    """A change that cannot be made."""


def change(raw: dict[str, Any], text: str, catalog: Catalog, places: Places) -> Problem | None:
    """Apply ``input=URI``, ``step=URI`` (the step becomes an input) or ``step.field=value`` to `raw`.

    Args:
        raw: The pipeline, changed in place; what has the wrong form in it stays as it is.
        text: The change.
        catalog: The operators and methods that the pipeline may name.
        places: Where parts of the pipeline are written; what is changed is written in the change from then on.

    Returns:
        Why it cannot be made, if it cannot.
    """
    try:
        _change(raw, text, catalog, places)
    except _Refused as refused:
        return Problem(("--set",), f"--set {text}: {refused}")
    return None


def _change(raw: dict[str, Any], text: str, catalog: Catalog, places: Places) -> None:
    target, equals, value = text.partition("=")
    where, dot, key = target.partition(".")
    if not equals or not value or not where or (dot and not key):
        raise _Refused("expected NAME=VALUE or STEP.FIELD=VALUE. Write both sides of '='.")
    inputs, steps = (_mapping(raw, section) for section in ("inputs", "steps"))
    place = Place(f"--set {text}")
    if where in inputs and not dot:
        kind = next(iter(inputs[where]), "model") if isinstance(inputs[where], dict) else "model"
        inputs[where] = {kind: value}
        places.known[("inputs", where)] = places.known[("inputs", where, kind)] = place
    elif where in inputs:
        raise _Refused(f"{where!r} is an input, expected a step before the dot. Write {where}=URI.")
    elif where not in steps and not isinstance(raw["steps"], dict):
        return  # its form is a problem of its own
    elif where not in steps:
        raise _Refused(f"no input or step is called {where!r}. {near(where, [*inputs, *steps])}")
    elif not dot:
        _replace(raw, inputs, steps, where, value, catalog)
        places.known[("inputs", where)] = place
    elif isinstance(steps[where], dict):
        section, name = _section(steps[where], key, catalog)
        if section:
            if section not in steps[where]:
                places.known[("steps", where, section)] = place
            fields = steps[where][section] = steps[where].get(section) or {}
            if isinstance(fields, dict):
                fields[name] = _value(value)
                places.known[("steps", where, section, name)] = place


def _mapping(raw: dict[str, Any], section: str) -> dict[str, Any]:
    found = raw[section] = raw.get(section) or {}
    return found if isinstance(found, dict) else {}


def _value(text: str) -> Any:
    found = Text(text, "value")
    if found.problems:
        raise _Refused(f"the value {shown(text)} is not YAML, expected a value. Put quotes around it.")
    return found.raw


def _section(step: Mapping[str, Any], key: str, catalog: Catalog) -> tuple[str, str]:
    """Where a field of a step stands: the section, and its name there; no section where nobody can tell."""
    section, _, inner = key.partition(".")
    if inner and section in SECTIONS:
        return section, inner
    try:
        verb = catalog.operator(str(step.get("operator")))
        fields = method_fields(verb, step, catalog)
    except LfmError:
        return "", ""  # an unknown operator or method, which is a problem of its own too
    resources = tuple(Resources.__dataclass_fields__)
    for section, known in (("method", fields), ("params", tuple(verb.params)), ("resources", resources)):
        if key in known:
            return section, key
    raise _Refused(f"the step has no field {key!r}. {near(key, [*fields, *verb.params, *resources])}")


def _replace(
    raw: dict[str, Any], inputs: dict[str, Any], steps: dict[str, Any], name: str, uri: str, catalog: Catalog
) -> None:
    """Turn a step into an input, and drop the steps that only it needed."""
    needed_before = _used(steps)
    step = steps.pop(name)
    try:
        kind = kind_of(catalog.operator(str(step.get("operator"))).gives[0]) if isinstance(step, dict) else "model"
    except LfmError:
        kind = "model"
    inputs[name] = {kind: uri}
    while orphans := [s for s in steps if s in needed_before and s not in _used(steps)]:
        for orphan in orphans:
            del steps[orphan]


def _used(steps: Mapping[str, Any]) -> set[str]:
    """Every name that some step takes as an input."""
    found: set[str] = set()
    for step in steps.values():
        inputs = step.get("inputs") if isinstance(step, dict) else None
        for value in inputs.values() if isinstance(inputs, dict) else ():
            names = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            found |= {n for n in names if isinstance(n, str)}
    return found
