"""The verb `merge`: experts fine-tuned from one base become one model."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lfm.errors import HyperparameterError, LfmError
from lfm.merging.base import Merge, survey
from lfm.weights import Header, Weights, Writer
from operators.artifact import Adapter, Model
from operators.base import operator
from operators.experts import MergeError, clause, opened, reader, unfit
from operators.facts import carry
from operators.language_models import DTYPES, config_of, copy_settings
from operators.workspace import Workspace


def problems(
    *, base: Model | None, experts: Sequence[Model | Adapter | None], method: Merge, **_: object
) -> Iterator[str]:
    """What headers tell is wrong, a clause each; what is None cannot be looked at yet."""
    if not experts:
        yield clause("merge", "no experts", "at least one", "Name a step or an input under experts.")
    else:
        try:
            method.check(len(experts))
        except HyperparameterError as problem:
            yield str(problem)
    source = None
    if base is not None:
        try:
            source = opened(f"base {base.uri!r}", base)
        except LfmError as problem:
            yield str(problem)
    for i, expert in enumerate(experts):
        if expert is not None:
            yield from unfit(_where(i, expert), expert, base, source)


@operator(problems=problems)
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
        MergeError: An expert has parameters that the base does not have, or the other way round, or in other shapes,
            or belongs to another base. Nothing is skipped.
    """
    wrong = tuple(problems(base=base, experts=experts, method=method))
    if wrong:
        raise MergeError(wrong)
    source = Weights(base.path)
    readers = [reader(_where(i, expert), expert, base, source) for i, expert in enumerate(experts)]
    floats = [n for n, h in source.headers.items() if h.dtype.is_floating_point]
    done, total = 0, (method.passes + 1) * len(floats)

    def read(name: str) -> tuple[Tensor, Tensor]:
        nonlocal done
        value = source.read(name).float()
        stack = torch.empty((len(readers), *value.shape))
        for i, read_expert in enumerate(readers):
            stack[i] = read_expert(name, value)
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
    carry([base.path, *(e.path for e in experts)], folder)
    return work.save(Model, folder, {"method": type(method).__name__, "experts": len(experts)})


def _stored(stored: torch.dtype, dtype: str) -> torch.dtype:
    return DTYPES[dtype] if stored.is_floating_point and dtype != "base" else stored


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if not cast.float().isfinite().all():
        word = str(dtype).removeprefix("torch.")
        fix = "Choose a dtype with more range, or look for it in the experts."
        raise MergeError((clause(f"merged {name!r}", f"infinite or not a number as {word}", "finite values", fix),))
    return cast


def _copy_config(source: Path, target: Path, dtype: str) -> None:
    copy_settings(source, target)
    if dtype != "base" and (source / "config.json").is_file():
        config = config_of(source)
        config.pop("torch_dtype", None)  # its older name
        (target / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def _where(index: int, expert: Model | Adapter) -> str:
    return f"experts[{index}] {expert.uri!r}"
