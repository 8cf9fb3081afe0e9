"""The verb `merge`: experts fine-tuned from one base become one model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lfm.errors import LfmError, ShapeError
from lfm.merging.base import Merge, survey
from lfm.weights import Header, Weights, Writer
from operators.adapters import read_adapter
from operators.artifact import Adapter, Model
from operators.base import operator
from operators.language_models import DTYPES, copy_tokenizer
from operators.workspace import Workspace

CONFIGS = ("config.json", "lfm.json", "preprocessor_config.json", "processor_config.json")
HEAD = "lm_head.weight"  # the one name that a folder may leave out, where the input embedding is used for it

Read = Callable[[str, Tensor], Tensor]
"""An expert's value of a parameter in float32, given its name in the base and the base's value."""


class MergeError(LfmError, ValueError):
    """Models that cannot be merged."""

    def __init__(self, where: str, what: str, allowed: str, fix: str) -> None:
        super().__init__(where, what, allowed, fix)
        self.where, self.what, self.allowed, self.fix = where, what, allowed, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected {self.allowed}. {self.fix}"


@operator()
def merge(
    work: Workspace,
    *,
    base: Model,
    experts: Sequence[Model | Adapter],
    method: Merge,
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base",
) -> Model:
    """Merge experts fine-tuned from one base into a single model, one parameter at a time, in float32.

    Args:
        work: The step's workspace.
        base: What all experts were fine-tuned from; the result has its parameters, config and tokenizer.
        experts: Whole models, or adapters, which stand for what they do to the base's weights.
        method: What becomes of one parameter.
        dtype: What the result is stored in; ``base`` keeps that of each parameter.

    Raises:
        ShapeError: An expert's parameter does not have the base's shape.
        MergeError: An expert has parameters that the base does not have, or the other way round, or belongs to
            another base. Nothing is skipped.
    """
    source = _opened(f"base {base.uri!r}", base)
    if not experts:
        raise MergeError("merge", "no experts", "at least one", "Name a step or an input under experts.")
    named = [(f"experts[{i}] {e.uri!r}", e) for i, e in enumerate(experts)]
    readers = [_reader(where, expert, base, source) for where, expert in named]
    floats = [n for n, h in source.headers.items() if h.dtype.is_floating_point]
    done, total = 0, (method.passes + 1) * len(floats)

    def read(name: str) -> tuple[Tensor, Tensor]:
        nonlocal done
        value = source.read(name).float()
        stack = torch.empty((len(readers), *value.shape))
        for i, reader in enumerate(readers):
            stack[i] = reader(name, value)
        done += 1
        work.progress(done, total)
        return value, stack

    found = survey(method, floats, read)
    folder = work.scratch / "merged"
    folder.mkdir()
    headers = {n: Header(h.shape, _stored(h.dtype, dtype)) for n, h in source.headers.items()}
    with Writer(folder, headers) as out:
        for name in floats:
            out.write(name, _cast(name, method.merge(name, *read(name), found), headers[name].dtype))
        for name in headers.keys() - set(floats):
            out.write(name, source.read(name))
    _copy_config(base.path, folder, dtype)
    return work.save(Model, folder, {"method": type(method).__name__, "experts": len(experts)})


def _stored(stored: torch.dtype, dtype: str) -> torch.dtype:
    return DTYPES[dtype] if stored.is_floating_point and dtype != "base" else stored


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if not cast.float().isfinite().all():
        word = str(dtype).removeprefix("torch.")
        fix = "Choose a dtype with more range, or look for it in the experts."
        raise MergeError(f"merged {name!r}", f"infinite or not a number as {word}", "finite values", fix)
    return cast


def _copy_config(source: Path, target: Path, dtype: str) -> None:
    copy_tokenizer(source, target)
    for name in CONFIGS:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
    if dtype != "base" and (source / "config.json").is_file():
        config = _config(source)
        config.pop("torch_dtype", None)  # its older name
        (target / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _opened(where: str, model: Model) -> Weights:
    """A model's weights.

    Raises:
        MergeError: They are quantized: what is stored is no weight then.
    """
    if _config(model.path).get("quantization_config"):
        raise MergeError(where, "quantized weights", "plain ones", "Merge the models it was quantized from.")
    return Weights(model.path)


def _reader(where: str, expert: Model | Adapter, base: Model, source: Weights) -> Read:
    """How to read an expert, after everything that its headers tell has been checked."""
    if isinstance(expert, Adapter):
        return _adapted(where, expert, base, source)
    weights = _opened(where, expert)
    names = {n: n for n in source.headers if n in weights.headers}
    for name in sorted(source.headers.keys() - weights.headers.keys()):
        twin = _twin(name, source, weights)
        if twin is None:
            fix = "Give the model that the expert was fine-tuned from as base."
            raise MergeError(where, f"no parameter {name!r}", "all that the base has", fix)
        names[name] = twin
    for name in sorted(weights.headers.keys() - source.headers.keys()):
        if _twin(name, weights, source) is None:
            fix = "Give the model that the expert was fine-tuned from as base."
            raise MergeError(where, f"parameter {name!r} beside the base's", "only what the base has", fix)
    for name, header in source.headers.items():
        _check_shape(where, name, weights.headers[names[name]].shape, header.shape)
        if not header.dtype.is_floating_point and not torch.equal(source.read(name), weights.read(names[name])):
            fix = "Integers cannot be merged; make them equal."
            raise MergeError(where, f"{name!r} differs from the base's", "the same integers", fix)
    return lambda name, value: weights.read(names[name]).float()


def _adapted(where: str, adapter: Adapter, base: Model, source: Weights) -> Read:
    trained_on = adapter.about.get("base")
    if trained_on and base.digest and trained_on != base.digest:
        fix = "An adapter is merged into the model that it was trained on."
        raise MergeError(where, f"an adapter of {trained_on!r}", f"one of the base {base.digest!r}", fix)
    changes = read_adapter(adapter.path)
    for name, change in changes.items():
        if name not in source.headers or not source.headers[name].dtype.is_floating_point:
            fix = "Take it out of the adapter's targets, or merge with the base that has it."
            raise MergeError(where, f"a change of {name!r}", "changes of what the base has", fix)
        _check_shape(where, name, change.shape, source.headers[name].shape)
    tied = _tied(base, source)
    for name in tied.keys() & changes.keys():
        fix = "Give a base whose config says tie_word_embeddings: false."
        raise MergeError(where, f"a change of {name!r}", f"none, as it is {tied[name]!r} in the base", fix)

    def read(name: str, value: Tensor) -> Tensor:
        change = changes.get(tied.get(name, name))
        return change(value) if change else value

    return read


def _check_shape(where: str, name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        fix = "Align the vocabularies, or merge models of one architecture."
        raise ShapeError(f"{where} {name!r}", got, wanted, fix)


def _tied(base: Model, source: Weights) -> dict[str, str]:
    """The output head, where the base stores it although it is the input embedding, with that embedding's name."""
    if not _config(base.path).get("tie_word_embeddings", True):
        return {}
    twins = {name: _twin(name, source, source) for name in source.headers}
    return {name: twin for name, twin in twins.items() if twin is not None}


def _twin(name: str, there: Weights, here: Weights) -> str | None:
    """What stands in for an output head: a parameter equal to it in `there`, which `here` has as well."""
    if not name.endswith(HEAD):
        return None
    value = None
    for other, header in there.headers.items():
        if other != name and other in here.headers and header == there.headers[name]:
            value = there.read(name) if value is None else value
            if torch.equal(value, there.read(other)):
                return other
    return None
