"""The verb `merge`: experts fine-tuned from one base become one model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from lfm.errors import HyperparameterError, LfmError
from lfm.merging.base import Merge, Weigh
from lfm.weights import SHARD_BYTES, Weights
from operators.artifact import Adapter, Dataset, Delta, Model, Statistics
from operators.base import Settings, operator
from operators.data.facts import carry
from operators.footprint import Footprint
from operators.merges.engine import MERGE, SCAN, Job, planned, stream, work as pieces_of
from operators.merges.experts import MergeError, unfit_to
from operators.merges.known import unknown
from operators.merges.plan import layers_of, memory, num_layers_of, stacked_config
from operators.merges.weighing import unweighable, weighed
from operators.models.language_models import config_of, copy_settings
from operators.needs import unmet
from operators.workspace import Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class Streaming(Settings):
    """How a merge passes through memory and into files.

    Attributes:
        memory_budget: Bytes that each process may take for values, beside its code. It changes nothing in the result.
        shard_bytes: A file of weights takes no further parameter beyond this.
    """

    noise = frozenset({"memory_budget"})

    memory_budget: int = 2 << 30
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        self.require(self.memory_budget >= 1, "memory_budget", "bytes, memory_budget >= 1")
        self.require(self.shard_bytes >= 1, "shard_bytes", "bytes, shard_bytes >= 1")


def problems(
    *,
    base: Model | None,
    experts: Sequence[Model | Adapter | Delta | None],
    statistics: Sequence[Statistics | None] | None = None,
    method: Merge,
    dtype: str = "base",
    streaming: Streaming | None = None,
    data: Mapping[str, Dataset | None] | None = None,
    length: int = 512,
    **_: object,
) -> Iterator[str]:
    """What headers tell is wrong, a clause each; what is None cannot be looked at yet."""
    yield from unmet(method, models=len(experts), called="experts")
    try:
        method.check(len(experts))
    except HyperparameterError as problem:
        yield str(problem)
    source = yield from unfit_to(base, experts)
    yield from unknown(method, statistics or (), experts, None if source is None else source.headers)
    yield from unweighable(base, data or {}, method, length)
    if base is not None and source is not None:
        yield from _too_large(base, source, len(experts), method, dtype, streaming or Streaming())


def _too_large(
    base: Model, source: Weights, num_experts: int, method: Merge, dtype: str, streaming: Streaming
) -> Iterator[str]:
    """Whether one thread could not do every piece within the budget, or its layers are not there."""
    try:
        found = planned(base, source, num_experts, method, dtype)
    except LfmError as problem:
        yield str(problem)
        return
    acts = (SCAN, MERGE) if method.passes else (MERGE,)
    most = max((memory(p, found[p.name], method) for act in acts for p in pieces_of(found, method, act)), default=0)
    if most > streaming.memory_budget:
        fix = "Raise it" + (", or choose a method that takes parameters apart." if not method.elementwise else ".")
        allowed = f"at least {most} bytes for the largest parameter"
        yield f"memory_budget={streaming.memory_budget}, expected {allowed}. {fix}"


def _footprint(*, streaming: Streaming, **_: object) -> Footprint:
    """At most what it may take."""
    return Footprint(activations=streaming.memory_budget)


@operator(problems=problems, shares_work=True, footprint=_footprint, like="base")
def merge(
    work: Workspace,
    *,
    base: Model,
    experts: Sequence[Model | Adapter | Delta],
    statistics: Sequence[Statistics] = (),
    data: Mapping[str, Dataset] = MappingProxyType({}),
    method: Merge,
    length: int = 512,
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base",
    streaming: Streaming = Streaming(),
) -> Model:
    """Merge experts fine-tuned from one base into a single model, stretch by stretch, in float32.

    Any number of workers, which are Ray tasks then, writes the same bytes.

    Args:
        work: The step's workspace.
        base: What all experts were fine-tuned from; the result has its parameters, config and tokenizer, and other
            layers where the method stacks them.
        experts: Whole models, or adapters and deltas, which stand for what they do to the base's weights.
        statistics: What was measured of each expert, in their order, where the method needs it.
        data: Sets of text by name, where the method learns how much of each expert to take; labels are not read.
        method: What becomes of one parameter.
        length: Tokens of a row of `data`.
        dtype: What the result is stored in; ``base`` keeps that of each parameter.
        streaming: How it passes through memory and into files.

    Raises:
        MergeError: An expert has parameters that the base does not have, or the other way round, or in other shapes,
            or belongs to another base; or the statistics are others'. Nothing is skipped.
    """
    arguments = {"experts": experts, "data": data, "statistics": statistics, "method": method, "length": length}
    wrong = tuple(problems(base=base, dtype=dtype, streaming=streaming, **arguments))  # type: ignore[arg-type]
    if wrong:
        raise MergeError(wrong)
    learnt = None
    if isinstance(method, Weigh):
        learnt = weighed(work, base=base, experts=experts, data=data, method=method, length=length)
    folder = work.scratch / "merged"
    job = Job(
        base=base,
        experts=tuple(experts),
        statistics=tuple(statistics),
        learnt=learnt,
        method=method,
        dtype=dtype,
        device=work.resources.device,
        folder=folder,
        shard_bytes=streaming.shard_bytes,
    )
    stream(work, job, memory_budget=streaming.memory_budget)
    _copy_config(base.path, folder, _config(base, len(experts), method, dtype))
    carry([base.path, *(e.path for e in experts)], folder)
    about: dict[str, object] = {"method": type(method).__name__, "experts": len(experts)}
    if learnt is not None:
        learnt.write(folder)
        about["coefficients"] = learnt.means()
    return work.save(Model, folder, about)


def _config(base: Model, num_experts: int, method: Merge, dtype: str) -> dict[str, object]:
    """The base's config, as far as it says something else of the result."""
    config: dict[str, object] = config_of(base.path)
    _, number = layers_of(Weights(base.path).headers, num_layers_of(config))
    layers = method.layers(num_experts, number)
    changed = config if layers is None else stacked_config(config, layers)
    if dtype == "base" or not config:
        return changed
    return {**{k: v for k, v in changed.items() if k != "torch_dtype"}, "dtype": dtype}  # its older name


def _copy_config(source: Path, target: Path, config: Mapping[str, object]) -> None:
    copy_settings(source, target)
    if config != config_of(source):
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
