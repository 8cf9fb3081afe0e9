"""Folders of what no library knows how to put into a model: tensors, and `lfm.json`, which says what puts them in."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm import catalog
from lfm.errors import LfmError
from lfm.method import Method
from lfm.rewriting import Rewrite
from lfm.weights import Header, Weights
from operators.artifact import REWRITES
from operators.models.description import described
from operators.models.ensemble_files import KEY

M = TypeVar("M")

STEM = "adapter_model"
FIX = "Give the folder as it was written, and the model that it was made for."


class RewriteError(LfmError, ValueError):
    """A folder whose `lfm.json` says nothing that can be done here, or whose tensors do not fit the model."""

    def __init__(self, folder: str, what: str, allowed: str) -> None:
        super().__init__(folder, what, allowed)
        self.folder, self.what, self.allowed = folder, what, allowed

    def __str__(self) -> str:
        return f"{self.folder!r} {self.what}, expected {self.allowed}. {FIX}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewrites:
    """What `lfm.json` holds.

    Attributes:
        methods: What rewrites a model, in this order.
        base: The digest of the model that it was made for; empty where that has none.
    """

    methods: tuple[Rewrite, ...]
    base: str = ""


def is_rewrites(folder: Path) -> bool:
    """Whether a folder is one of these."""
    return (folder / REWRITES).is_file()


def name_of(method: Method) -> str | None:
    """The name of a method of this project, such as ``tuning/prefix``; None for a user's own."""
    package, _, stem = type(method).__module__.partition(".")
    name = stem.replace(".", "/")
    return name if package == "lfm" and name in catalog.names() else None


def read(folder: Path) -> Rewrites:
    """What rewrites the model of a folder. Methods come from this project's catalogue alone.

    Raises:
        RewriteError: It names none, or with fields that it does not have.
        WeightsError: It is no JSON object.
    """
    methods, found = methods_in(folder, Rewrite)  # type: ignore[type-abstract]
    return Rewrites(methods=methods, base=str(found.get("base") or ""))


def methods_in(folder: Path, kind: type[M]) -> tuple[tuple[M, ...], Mapping[str, Any]]:
    """The methods of a kind that a folder's `lfm.json` lists, and all that stands in that file.

    Raises:
        RewriteError: It names none, or others, or with fields that they do not have.
        WeightsError: It is no JSON object.
    """
    found = described(folder)
    steps = found.get(KEY)
    if not isinstance(steps, list) or not steps:
        raise RewriteError(str(folder), f"has no list of {KEY!r} in its {REWRITES}", "one of methods with their fields")
    return tuple(_method(folder, step, kind) for step in steps), found


def unreadable(folder: Path) -> tuple[str, str] | None:
    """What keeps `read` from reading a folder that may be one of these, as a clause, and what to do about it."""
    try:
        if is_rewrites(folder):
            read(folder)
    except RewriteError as problem:
        return f"{problem.what}, expected {problem.allowed}", FIX
    return None


def made_for(folder: Path) -> str:
    """The digest of the base of a folder that may be one of these; empty where it says none."""
    return read(folder).base if is_rewrites(folder) else ""


def _method(folder: Path, step: Any, kind: type[M]) -> M:
    from pydantic import TypeAdapter, ValidationError  # what has no such folder needs none of it

    name = step.get("method") if isinstance(step, dict) else None
    method = catalog.find(name) if name in catalog.names() else None
    if method is None or not issubclass(method, kind):
        what = f"names the rewrite {name!r} in its {REWRITES}"
        raise RewriteError(str(folder), what, "a method of this version that rewrites a model")
    try:
        made: M = TypeAdapter(method).validate_python(step.get("fields", {}))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"gives {name} the field {'.'.join(map(str, first['loc']))!r} in its {REWRITES}: {first['msg']}"
        raise RewriteError(str(folder), what, "its fields of this version") from error
    return made


def write(folder: Path, method: Method, tensors: Mapping[str, Tensor], *, base: str) -> None:
    """Write what `method` learnt, in float32.

    Args:
        folder: A new one.
        method: What rewrites a model: one of this project, see `name_of`.
        tensors: Their values, by their names in the rewritten model.
        base: The digest of the model that they were made for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.float().contiguous() for n, t in tensors.items()}, folder / f"{STEM}.safetensors")
    say(folder, method, base=base)


def say(folder: Path, method: Method, **about: object) -> None:
    """Write a folder's `lfm.json`: the method with its fields, and what else is to be known of it."""
    said = {KEY: [{"method": name_of(method), "fields": method.hyperparameters()}], **about}
    (folder / REWRITES).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def rewritten(model: nn.Module, folder: Path, stem: str = STEM) -> nn.Module:
    """The same model, rewritten as a folder says and with the tensors that lie there.

    Raises:
        RewriteError: Something that was put in has no tensor, or a tensor is of nothing in the model.
        NoBlocks: The model has no place for what is to be put in.
    """
    before = {n for n, _ in model.named_parameters()}
    training = model.training
    for method in read(folder).methods:
        method.rewrite(model)
    fill(model, folder, (stem,), {n for n, _ in model.named_parameters()} - before)
    return model.train(training)


def fill(model: nn.Module, folder: Path, stems: Sequence[str], added: Collection[str]) -> None:
    """Give parameters of a model the values that lie in a folder.

    Args:
        model: Rewritten already.
        folder: Holds the tensors, by the parameters' names.
        stems: What the names of their files begin with.
        added: The parameters that need a tensor: what was put in.

    Raises:
        RewriteError: One has none, or a tensor is of nothing in the model.
    """
    parameters = dict(model.named_parameters())
    stored = [Weights(folder, stem) for stem in stems]
    _check(folder, parameters, added, {n: h for weights in stored for n, h in weights.headers.items()})
    with torch.no_grad():
        for weights in stored:
            for name in weights.headers:
                parameters[name].copy_(weights.read(name))


def _check(
    folder: Path, parameters: Mapping[str, Tensor], added: Collection[str], stored: Mapping[str, Header]
) -> None:
    for name in sorted({*stored, *added}):
        if name not in stored:
            raise RewriteError(str(folder), f"has no tensor {name!r}", "one for all that it puts into the model")
        if name not in parameters:
            raise RewriteError(str(folder), f"has a tensor {name!r}", "only such as the rewritten model has")
        got, wanted = stored[name].shape, tuple(parameters[name].shape)
        if got != wanted:
            raise RewriteError(str(folder), f"has {name!r} of shape {got}", f"{wanted} as in the rewritten model")
