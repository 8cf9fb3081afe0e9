"""The verbs `apply` and `revert`: a change is added to a model's weights, and taken away again."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lfm.deltas import Change, read
from lfm.errors import LfmError, ShapeError, UnknownName
from lfm.weights import Header, Weights, Writer
from operators.artifact import Delta, Model
from operators.base import operator
from operators.data.facts import carry
from operators.models.belonging import strange
from operators.models.language_models import config_of, copy_settings
from operators.workspace import Workspace

STACK = "stack"
"""What `about` calls the changes that a model has had since it was made: of each the digest of the model that it was
applied to (``base``) and its own (``delta``), the first one first."""


class ApplyError(LfmError, ValueError):
    """A change that does not fit a model, a clause each."""

    def __init__(self, clauses: tuple[str, ...]) -> None:
        super().__init__(clauses)
        self.clauses = clauses

    def __str__(self) -> str:
        return "\n".join(self.clauses)


class RevertError(LfmError, ValueError):
    """A model and what is to be what it was before its last change, which do not go together."""

    def __init__(self, where: str, digest: str, what: str, allowed: str, fix: str) -> None:
        super().__init__(where, digest, what, allowed, fix)
        self.where, self.digest, self.what, self.allowed, self.fix = where, digest, what, allowed, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.digest[:12] or 'unknown'} {self.what}, expected {self.allowed}. {self.fix}"


def _unfit(*, model: Model | None, delta: Delta | None, force: bool = False, **_: object) -> Iterator[str]:
    if not force:
        yield from map(str, strange("apply", delta, model, "Give that model, or say force: true."))
    if model is None or delta is None:
        return
    try:
        _located(model.path, delta.path)
    except LfmError as error:
        yield str(error)


@operator(problems=_unfit, like="model")
def apply(work: Workspace, *, model: Model, delta: Delta, force: bool = False) -> Model:
    """Add a change to a model's weights, one parameter at a time; the result is a model as any other.

    What is added is added in float32 and stored as the model stores it: in half precision it is rounded.

    Args:
        work: The step's workspace.
        model: Who is changed; it stays as it is.
        delta: What is added.
        force: Also to another model than the one that the change was made for, if only it has such parameters.

    Raises:
        ApplyError: The change was made for another model, or does not fit this one.
    """
    wrong = tuple(_unfit(model=model, delta=delta, force=force))
    if wrong:
        raise ApplyError(wrong)
    source, changes = _located(model.path, delta.path)
    folder = work.scratch / "applied"
    folder.mkdir()
    with Writer(folder, source.headers) as out:
        for done, name in enumerate(source.headers, start=1):
            value = source.read(name)
            out.write(name, _changed(name, value, changes[name]) if name in changes else value)
            work.progress(done, len(source.headers))
    copy_settings(model.path, folder)
    carry([model.path, delta.path], folder)
    one = {"base": model.digest, "delta": delta.digest}
    return work.save(Model, folder, {**one, STACK: [*stack_of(model), one]})


def stack_of(model: Model) -> list[Mapping[str, Any]]:
    """The changes that a model has had, the first one first."""
    found = model.about.get(STACK, [])
    assert isinstance(found, list)
    return found


def _located(model: Path, delta: Path) -> tuple[Weights, dict[str, Change]]:
    """A model's weights, and what is added to which, by its name in the files; reads headers only of the model.

    Raises:
        LfmError: The change does not fit.
    """
    if config_of(model).get("quantization_config"):
        raise ApplyError(("model: its weights are quantized, expected plain ones. Change what it was made from.",))
    source = Weights(model)
    changes = {stored_name(name, source.headers): change for name, change in read(delta).items()}
    for name, change in changes.items():
        if change.shape != source.headers[name].shape:
            fix = "Apply it to a model of the same architecture."
            raise ShapeError(f"change of {name!r}", change.shape, source.headers[name].shape, fix)
    return source, changes


def stored_name(name: str, headers: Mapping[str, Header]) -> str:
    """What a folder's files call a parameter of the model: some leave out what all names begin with.

    Raises:
        UnknownName: They have no such parameter.
    """
    if name in headers:
        return name
    found = [n for n in headers if name.endswith(f".{n}")]
    if len(found) != 1:
        raise UnknownName("parameter", name, tuple(headers))
    return found[0]


def _changed(name: str, value: Tensor, change: Change) -> Tensor:
    changed = (value.float() + change.whole()).to(value.dtype)
    if not changed.isfinite().all():
        what = f"{name!r} becomes infinite or not a number as {value.dtype}"
        raise ApplyError((f"delta: {what}, expected finite values. Look at what it was made from.",))
    return changed


def _not_last(*, model: Model | None, base: Model | None, **_: object) -> Iterator[str]:
    if model is None or base is None or not base.digest:
        return
    try:
        check_last(model, base)
    except RevertError as error:
        yield str(error)


@operator(problems=_not_last, like="base")
def revert(work: Workspace, *, model: Model, base: Model) -> Model:
    """Take a model's last change away: what it was before is handed on, the very same artifact.

    Nothing is subtracted, which would not give the same weights. Changes lie on each other: the last is taken first.

    Args:
        work: The step's workspace.
        model: What `apply` made.
        base: What it was made from.

    Raises:
        RevertError: The model is none that was changed, or `base` is not what was changed last.
    """
    check_last(model, base)
    return base


def check_last(model: Model, base: Model) -> None:
    """Raise `RevertError` unless `base` is what `model` was before its last change."""
    stack = stack_of(model)
    if not stack:
        fix = "Give what apply made."
        raise RevertError("model", model.digest, "was not made by apply", "a model that was changed", fix)
    below = [str(entry["base"]) for entry in stack]
    if below[-1] == base.digest:
        return
    last = "what was changed last"
    if base.digest in below:
        later = len(stack) - 1 - below.index(base.digest)
        what = f"lies below {later} later change{'s' if later > 1 else ''}"
        raise RevertError("base", base.digest, what, last, f"Revert to {below[-1][:12]} first.")
    raise RevertError("base", base.digest, "is not on the way to this model", last, f"Give {below[-1][:12]}.")
