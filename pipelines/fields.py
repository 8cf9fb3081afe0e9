"""Plain values -> a method, resources or the parameters of a step, with a sentence for each that is not right."""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lfm.errors import FieldError, LfmError
from operators.base import Operator
from pipelines.problems import Part, near, shown

ANYTHING = TypeAdapter(Any)  # made once: making one takes a millisecond
_adapter = functools.lru_cache(maxsize=1024)(TypeAdapter)  # of a class, which equals no other
LARGEST = 2**63  # what the libraries below take as an integer
KINDS = {  # pydantic's words, which begin the names of its errors
    "int": "an integer",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
    "dataclass": "a mapping",
}

Wrong = tuple[Part, str]
"""Which of the values, and a sentence about it."""


def object_of(
    cls: type[Any], given: Mapping[str, Any], what: str, known: Sequence[str] = ()
) -> tuple[Any, list[Wrong]]:
    """An object of a dataclass, or None, and everything that is wrong with what its fields were given.

    Args:
        cls: The dataclass.
        given: Its fields by name; those that are left out have their defaults.
        what: What sentences call it.
        known: Names for what an unknown field may have meant; without any its own.
    """
    names = [f.name for f in fields(cls)]
    wrong: list[Wrong] = []
    left: dict[str, Any] = {}
    for key, value in given.items():
        odd = _odd(value)
        if key not in names:
            wrong.append(((key,), f"{what} has no field {key!r}. {near(key, known or names)}"))
        elif odd:
            wrong.append(((key,), f"{what}: {key}={shown(value)}, expected {odd}."))
        else:
            left[key] = value
    dropped: list[str] = []
    made = None
    while made is None:
        try:
            made = _adapter(cls).validate_python(left)  # type: ignore[arg-type]  # a class is hashable
        except ValidationError as error:
            found = list(_sentences(error, left, what))
            wrong += [(path, s) for path, s, depends in found if not _follows(depends, [*dropped, *_heads(wrong)])]
            gone = {path[0] for path, _, _ in found if path and path[0] in left}
            if not gone:
                break
            dropped += sorted(gone)
            left = {k: v for k, v in left.items() if k not in gone}
    if made is not None and not wrong:
        wrong += [w for k, v in left.items() for w in _booleans((k,), v, getattr(made, k), f"{what}: {k}")]
    return (None if wrong else made), wrong


def parameters_of(verb: Operator[Any], given: Mapping[str, Any]) -> tuple[dict[str, object], list[Wrong]]:
    """All parameters of a step as plain values, which is how they are hashed and sent, and what is wrong with them."""
    found: dict[str, object] = {}
    wrong: list[Wrong] = []
    bundled = {f.name: cls for cls in verb.bundles.values() for f in fields(cls)}  # type: ignore[arg-type]
    for cls in verb.bundles.values():
        made, problems = object_of(cls, {k: v for k, v in given.items() if bundled.get(k) is cls}, verb.name)
        wrong += problems
        if made is not None:
            found |= {f.name: getattr(made, f.name) for f in fields(cls)}  # type: ignore[arg-type]
    for key, parameter in verb.params.items():
        if key in bundled:
            continue
        if key not in given:
            if parameter.required:
                wrong.append(((), f"{verb.name!r} needs the parameter {key!r}."))
            found[key] = parameter.default
            continue
        odd = _odd(given[key])
        if odd:
            wrong.append(((key,), f"{verb.name}: {key}={shown(given[key])}, expected {odd}."))
            continue
        try:
            found[key] = parameter.adapter.validate_python(given[key])
        except ValidationError as error:
            wrong += [w[:2] for w in _sentences(error, given[key], verb.name, at=(key,))]
            continue
        wrong += _booleans((key,), given[key], found[key], f"{verb.name}: {key}")
    if wrong:
        return {}, wrong
    return {k: plain(found[k]) for k in verb.params}, []


def plain(value: Any) -> Any:
    """A value as JSON has it, the same in every process."""
    if is_dataclass(value):
        return {name: plain(getattr(value, name)) for name in sorted(f.name for f in fields(value))}
    if isinstance(value, Mapping):  # whose order its reader may go by
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):  # whose order is another one in each process
        return sorted((plain(v) for v in value), key=repr)
    return ANYTHING.dump_python(value, mode="json")


def _odd(value: object) -> str:
    """What a value would have to be that no computation and no JSON takes; nothing where it is one that they take."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "an integer of at most 64 bits"
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next(filter(None, map(_odd, inner)), "")


def _booleans(path: Part, value: object, made: object, what: str) -> Iterator[Wrong]:
    """Each true or false that stands where a number is meant, which Python takes for 1 or 0."""
    if isinstance(value, bool) and type(made) in (int, float):
        kind = KINDS[type(made).__name__]
        yield path, f"{what}={value!r}, expected {kind}. YAML reads yes, no, on and off as true and false."
    elif isinstance(value, list | tuple) and isinstance(made, list | tuple):
        for number, (inner, of_made) in enumerate(zip(value, made, strict=False)):
            yield from _booleans((*path, str(number)), inner, of_made, f"{what}.{number}")


def _heads(wrong: Sequence[Wrong]) -> list[str]:
    return [path[0] for path, _ in wrong if path]


def _follows(allowed: str, wrong: Sequence[str]) -> bool:
    """Whether what is allowed depends on a field that is wrong itself, so that nothing can be said yet."""
    return any(re.search(rf"\b{re.escape(name)}\b", allowed) for name in wrong)


def _sentences(error: ValidationError, given: Any, what: str, at: Part = ()) -> Iterator[tuple[Part, str, str]]:
    """Each mistake once: which value, a sentence, and what that sentence says is allowed."""
    expected: dict[Part, tuple[object, list[str]]] = {}
    for problem in error.errors():
        kind, cause = problem["type"], problem.get("ctx", {}).get("error")
        path = (*at, *_located(given, problem["loc"]))
        if isinstance(cause, FieldError):
            name = ".".join((*path, cause.field))
            sentence = f"{what}: {name}={shown(cause.value)}, expected {cause.allowed}."
            yield (*path, *cause.field.split(".")), sentence, cause.allowed
        elif cause is not None:
            yield path, str(cause) if isinstance(cause, LfmError) else f"{what}: {str(cause).rstrip('.')}.", ""
        elif kind.startswith("missing"):
            lacking = str(problem["loc"][-1])
            yield path, f"{what} needs {'.'.join((*path, lacking))}.", lacking
        elif kind in ("unexpected_keyword_argument", "extra_forbidden"):
            yield path, f"{what}: {'.'.join(path[:-1])} has no field {path[-1]!r}.", ""
        else:
            expected.setdefault(path, (problem["input"], []))[1].append(_allowed(problem))
    for path, (value, allowed) in expected.items():
        if any(other != path and other[: len(path)] == path for other in expected):
            continue  # a union of which another member says more
        name = f"{what}: {'.'.join(path)}" if path else what
        yield path, f"{name}={shown(value)}, expected {' or '.join(dict.fromkeys(allowed))}.", ""


def _located(given: Any, location: Sequence[str | int]) -> Part:
    """The keys and indexes of a location, without the names that pydantic gives the members of a union."""
    path: list[str] = []
    value = given
    for part in location:
        inside = (
            part in value
            if isinstance(value, Mapping)
            else isinstance(value, list | tuple) and part in range(len(value))
        )
        if inside:
            path.append(str(part))
            value = value[part]
    return tuple(path)


def _allowed(problem: Mapping[str, Any]) -> str:
    kind = KINDS.get(problem["type"].partition("_")[0])
    if kind is not None:
        return kind
    if problem["type"] in ("literal_error", "enum"):
        return str(problem["ctx"]["expected"])
    message = str(problem["msg"]).removeprefix("Input should be ")
    return f"{message[0].lower()}{message[1:]}"
