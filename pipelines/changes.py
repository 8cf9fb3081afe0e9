"""``--set A.B=VALUE``: a pipeline as plain values -> the same with one thing changed."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
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

    The field ``method`` is the whole method.

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
        _put(("steps", where), steps[where], key, _value(value), catalog, places, place)


def vary(raw: dict[str, Any], values: Mapping[str, Any], catalog: Catalog) -> list[str]:
    """Apply plain values by ``STEP.FIELD`` to a whole pipeline, as `change` does with texts.

    Returns:
        Why some cannot be, a sentence each.
    """
    problems = []
    for target, value in values.items():
        where, _, key = target.partition(".")
        try:
            if where not in raw["steps"] or not key:
                known = {f"{n}.{key}": n for n in raw["steps"]}
                raise _Refused(f"expected STEP.FIELD of a step. {near(target, known)}")
            own = deepcopy(value)  # into which the next change may write
            _put(("steps", where), raw["steps"][where], key, own, catalog, Places(""), Place(""))
        except _Refused as refused:
            problems.append(f"{target}: {refused}")
    return problems


def written(raw: Mapping[str, Any], targets: Iterable[str], catalog: Catalog) -> dict[str, Any]:
    """The values that fields have in a whole pipeline, by ``STEP.FIELD``; without those that it does not have."""
    found = {}
    for target in targets:
        where, _, key = target.partition(".")
        step = raw["steps"][where]
        try:
            section, name = ("", "method") if key == "method" else _section(step, key, catalog)
        except _Refused:  # a field that only another method has
            continue
        fields = step[section] if section else step
        if name in fields:
            found[target] = fields[name]
    return found


def _put(
    path: tuple[str, str], step: dict[str, Any], key: str, value: Any, catalog: Catalog, places: Places, place: Place
) -> None:
    """Set a field of a step, or its whole method, where what has the field is known."""
    if key == "method":
        step[key] = value
        places.known[(*path, key)] = place
        return
    section, name = _section(step, key, catalog)
    if not section:
        return
    if section not in step:
        places.known[(*path, section)] = place
    fields = step[section] = step.get(section) or {}
    if isinstance(fields, dict):
        fields[name] = value
        places.known[(*path, section, name)] = place


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
        kind = _kind(step, inputs, steps, catalog)
    except LfmError:
        kind = "model"
    inputs[name] = {kind: uri}
    while orphans := [s for s in steps if s in needed_before and s not in _used(steps)]:
        for orphan in orphans:
            del steps[orphan]


def _kind(step: Any, inputs: Mapping[str, Any], steps: Mapping[str, Any], catalog: Catalog) -> str:
    """The word for what a step makes, as far as its text tells."""
    if not isinstance(step, dict):
        return "model"
    verb = catalog.operator(str(step.get("operator")))
    given = step.get("inputs")
    followed = given.get(verb.follows) if isinstance(given, dict) else None
    if not isinstance(followed, str):
        return kind_of(verb.gives[0])
    if isinstance(inputs.get(followed), dict):
        return str(next(iter(inputs[followed]), "model"))
    return _kind(steps.get(followed), inputs, {k: s for k, s in steps.items() if k != followed}, catalog)


def _used(steps: Mapping[str, Any]) -> set[str]:
    """Every name that some step takes as an input."""
    found: set[str] = set()
    for step in steps.values():
        inputs = step.get("inputs") if isinstance(step, dict) else None
        for value in inputs.values() if isinstance(inputs, dict) else ():
            names = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            found |= {n for n in names if isinstance(n, str)}
    return found
