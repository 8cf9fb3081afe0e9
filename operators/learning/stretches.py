"""A training whose settings change midway -> what is trained from each change to the next."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from lfm.method import Method
from operators.training import Change, Training

T = TypeVar("T", Training, Method)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A part of a training in which nothing changes.

    Attributes:
        first: Steps that were made before it.
        training: Its settings; it rests where the next one begins.
        arguments: What its job is put together from.
    """

    first: int
    training: Training
    arguments: Mapping[str, Any]


def stretches(training: Training, arguments: Mapping[str, Any]) -> list[Stretch]:
    """The parts of a training, in order; one where nothing changes.

    Args:
        training: The whole.
        arguments: What a job is put together from: its ``training`` and ``method``, where it has such, change too.
    """
    found = [Stretch(first=0, training=replace(training, midway=()), arguments=arguments)]
    for change in training.midway:
        if training.rest_at is not None and training.rest_at <= change.at:
            break
        before = found[-1]
        found[-1] = replace(before, training=replace(before.training, rest_at=change.at))
        found.append(_changed(before, change))
    return found


def _changed(before: Stretch, change: Change) -> Stretch:
    method: Method | None = before.arguments.get("method")
    own = _own(change.values, method)
    others = {k: v for k, v in change.values.items() if k not in own}
    arguments = dict(before.arguments)
    if method is not None:
        arguments["method"] = adjusted(method, own)
    if "training" in arguments:
        arguments["training"] = adjusted(arguments["training"], others)
    return Stretch(first=change.at, training=adjusted(before.training, others), arguments=arguments)


def _own(values: Mapping[str, Any], method: Method | None) -> dict[str, Any]:
    """Those that are the method's."""
    return {k: v for k, v in values.items() if method is not None and k in method.adjustable}


def adjusted(settings: T, values: Mapping[str, Any]) -> T:
    """The same settings with some other values, read as those of a pipeline are.

    Raises:
        ValidationError: One is not what the field allows.
    """
    if not values:
        return settings
    from pydantic import TypeAdapter  # here, so that a job runs where nothing of a pipeline is installed

    before = {f.name: getattr(settings, f.name) for f in fields(settings)}  # type: ignore[arg-type]
    made: T = TypeAdapter(type(settings)).validate_python({**before, **values})
    return made


def refused_changes(training: Training, method: Method | None) -> Iterator[str]:
    """What is wrong with values that change midway, a clause each."""
    allowed = sorted(Training.adjustable | (frozenset() if method is None else method.adjustable))
    for change in training.midway:
        for name in change.values.keys() - {*allowed}:
            said = f"midway: {name!r} after {change.at} steps, expected one of {', '.join(allowed)}"
            yield f"{said}. Nothing else can change while it trains."
        own = _own(change.values, method)
        others = {k: v for k, v in change.values.items() if k not in own and k in Training.adjustable}
        try:
            adjusted(training, others)
            if method is not None:
                adjusted(method, own)
        except ValueError as error:
            yield f"midway: after {change.at} steps {_first(error)}. Change it."


def _first(error: ValueError) -> str:
    """What pydantic says first, on one line."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error).rstrip(".")
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if cause is not None:
        return str(cause).rstrip(".")
    return f"{problem['loc'][-1]}={problem['input']!r}, expected {str(problem['msg']).removeprefix('Input should be ')}"
