"""The verb `ensemble`: several models become one that answers for all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import override

from lfm.ensembling.base import Build, Combine, Ensemble
from lfm.errors import HyperparameterError, LfmError
from lfm.weights import Header, Weights, Writer
from operators.artifact import Adapter, Artifact, Dataset, Delta, Model, kind_of
from operators.base import operator
from operators.data.batches import Batch
from operators.data.facts import carry
from operators.data.vocabulary import tokens
from operators.learning.loop import Job, Place
from operators.learning.trainer import fit
from operators.learning.unlabelled import Balanced, looking, training_of, unsuited
from operators.merges.experts import Expert, called, reader, unfit_to
from operators.models.classifiers import GIVE_HEAD, HEADLESS, labels_of
from operators.models.ensemble_files import EXPERTS, LEARNT, member
from operators.models.ensembles import built, read, write_committee
from operators.models.language_models import (
    CALLED,
    architecture_of,
    config_of,
    copy_settings,
    head_size,
    other_names,
    outline,
)
from operators.models.rewrites import name_of, say
from operators.needs import unmet
from operators.resources import Resources
from operators.training import Training
from operators.workspace import Workspace


class EnsembleError(LfmError, ValueError):
    """Models that cannot answer as one, with everything that is known to keep them from it, a clause each."""

    def __init__(self, clauses: tuple[str, ...]) -> None:
        super().__init__(clauses)
        self.clauses = clauses

    def __str__(self) -> str:
        return "\n".join(self.clauses)


def problems(
    *,
    base: Model | None,
    members: Sequence[Expert | None],
    data: Mapping[str, Dataset | None] | None = None,
    method: Ensemble,
    length: int = 512,
    resources: Resources,
    kinds: Mapping[str, Sequence[type[Artifact]]],
    **_: object,
) -> Iterator[str]:
    """What headers tell is wrong, a clause each; what is None cannot be looked at yet."""
    yield from unmet(method, models=len(members), called="members", data=bool(data))
    name = type(method).__name__
    if name_of(method) is None:
        fix = "Whoever loads the model has to know it: add it to lfm/."
        yield f"method: {name} is a pipeline's own, expected a method of this project. {fix}"
    try:
        method.check(len(members))
    except HyperparameterError as problem:
        yield str(problem)
    if isinstance(method, Combine):
        if "base" in kinds:
            yield f"base: given with {name}, expected none, as it asks the members alone. Leave it out."
        if resources.most > 1:
            yield f"workers={resources.spoken} with {name}, which trains nothing, expected 1. Leave it out."
        for kind in {k for k in kinds["members"] if k in (Adapter, Delta)}:
            fix = "Merge it into its base first."
            yield f"members: {kind_of(kind)!r} with {name}, expected whole models. {fix}"
        yield from _unlike([(called(i, m), m.path) for i, m in enumerate(members) if isinstance(m, Model)])
    elif "base" not in kinds:
        yield f"base: none is given, expected the model that the members were fine-tuned from, for {name}. Name it."
    else:
        yield from _unbuildable(base, members, data or {}, method, length)


def _unlike(members: Sequence[tuple[str, Path]]) -> Iterator[str]:
    """What keeps whole models from answering the same question in the same words."""
    for where, path in members:
        if not (path / "config.json").is_file():
            yield f"{where}: no config.json, expected a folder that from_pretrained loads. Check the path."
        elif architecture_of(path) == "encoder":
            yield f"{where}: an encoder: {HEADLESS}. {GIVE_HEAD}"
    first = members[0][1] if members else None
    for where, path in members[1:]:
        assert first is not None
        theirs, ours = architecture_of(path), architecture_of(first)
        if theirs != ours:
            yield f"{where}: {CALLED[theirs]}, expected {CALLED[ours]} as the first one is. Give models of one kind."
        elif labels_of(path) != labels_of(first):
            what = f"labels {', '.join(labels_of(path))}, expected {', '.join(labels_of(first))} as the first one has"
            yield f"{where}: {what}. Give classifiers of the same labels in the same order."
        elif tokens(path) != tokens(first):
            yield f"{where}: another vocabulary, expected that of the first one. Give models of one tokenizer."
        elif not labels_of(path) and head_size(path) != head_size(first):
            what = f"a head of {head_size(path)} tokens, expected {head_size(first)} as the first one has"
            yield f"{where}: {what}. Give models whose vocabularies are padded alike."


def _unbuildable(
    base: Model | None,
    members: Sequence[Expert | None],
    data: Mapping[str, Dataset | None],
    method: Ensemble,
    length: int,
) -> Iterator[str]:
    """What keeps a network from being built of a base and experts."""
    source = yield from unfit_to(base, members)
    yield from unsuited(base, data, length)
    if base is not None and source is not None and isinstance(method, Build) and config_of(base.path):
        try:
            _rooms(base, source, method, len(members))
        except LfmError as problem:
            yield f"base: {problem}"


@operator(problems=problems, shares_work=True, makes_ensembles=True)
def ensemble(
    work: Workspace,
    *,
    base: Model | None = None,
    members: Sequence[Model | Adapter | Delta],
    data: Mapping[str, Dataset] = MappingProxyType({}),
    method: Ensemble,
    length: int = 512,
) -> Model:
    """Make one model of several: of what they say, or one network out of their weights.

    The result is a folder that only this project loads: `evaluate`, `serve`, `label` and `distill`, as a teacher, take
    it; what changes or reads a model's weights refuses it.

    Args:
        work: The step's workspace. Several workers share the rows of each step of what is learnt.
        base: What all members were fine-tuned from, where the method builds one network of them.
        members: Whole models of the same labels or the same vocabulary, or such experts of one base as `merge` takes.
        data: Sets of text by name, where something in the network learns; labels are not read.
        method: How they become one.
        length: Tokens of a row of `data`.

    Raises:
        EnsembleError: The members do not go together, or not with the base.
        UnsupportedModel: The base's files name its parameters otherwise than transformers does.
    """
    given = {"base": base} if base is not None else {}
    kinds = {**{k: (type(v),) for k, v in given.items()}, "members": tuple(type(m) for m in members)}
    wrong = tuple(
        problems(
            base=base,
            members=members,
            data=data,
            method=method,
            length=length,
            resources=work.resources,
            kinds=kinds,
        )
    )
    if wrong:
        raise EnsembleError(wrong)
    folder = work.scratch / "ensemble"
    measures: dict[str, int] = {}
    if isinstance(method, Combine):
        write_committee(folder, method, [m.path for m in members])
    else:
        assert isinstance(method, Build)
        assert base is not None
        _write_built(folder, base, members, method)
        measures = _learnt(work, folder, data, method, length)
    carry([m.path for m in ([] if base is None else [base]) + list(members)], folder)
    return work.save(Model, folder, {"method": type(method).__name__, "models": len(members), **measures})


def _rooms(base: Model, source: Weights, method: Build, num_experts: int) -> Mapping[str, str]:
    """What `Build.build` returns, by the names in the base's files.

    Raises:
        UnsupportedModel: They have other names.
        NoBlocks: The network has no place for what is new.
    """
    with torch.device("meta"):
        causal = architecture_of(base.path) == "decoder"
        rooms = method.build(outline(base.path), num_experts, causal=causal)
    lacking = next((name for name in rooms if name not in source.headers), None)
    if lacking is not None:
        raise other_names(base.path, lacking)
    return rooms


def _write_built(folder: Path, base: Model, members: Sequence[Expert], method: Build) -> None:
    """Write all of a built model that is not learnt, one parameter at a time."""
    source = Weights(base.path)
    rooms = _rooms(base, source, method, len(members))
    readers = [reader(called(i, expert), expert, base, source) for i, expert in enumerate(members)]
    inside = member(folder, 0)
    inside.mkdir(parents=True)
    copy_settings(base.path, folder)
    copy_settings(base.path, inside)
    headers = source.headers
    kept = {new: Header((len(members), *headers[n].shape), headers[n].dtype) for n, new in rooms.items()}
    with Writer(inside, headers) as plain, Writer(folder, kept, stem=EXPERTS) as apart:
        for name, header in headers.items():
            stored = source.read(name)
            if not header.dtype.is_floating_point:
                plain.write(name, stored)
                continue
            value = stored.float()
            experts = torch.empty((len(members), *value.shape))
            for read, expert in zip(readers, experts, strict=True):
                with read(name) as values:
                    values(0, value, expert)
            if name in rooms:
                plain.write(name, stored)
                apart.write(rooms[name], (experts - value).to(header.dtype))
            else:
                plain.write(name, method.merge(name, value, experts).to(header.dtype))
    say(folder, method, models=len(members))


def _learnt(work: Workspace, folder: Path, data: Mapping[str, Dataset], method: Build, length: int) -> dict[str, int]:
    """Learn what is new in a built model, and write it beside the rest."""
    training = training_of(method, num_sets=len(data), length=length, seed=work.seed)
    resources = replace(work.resources, strategy="ddp" if work.resources.most > 1 else "single")
    arguments = {"folder": folder, "data": dict(data), "training": training}
    found, measures = fit(work, _job, arguments, training, resources)
    file = f"{LEARNT}.safetensors"
    (found / file).rename(folder / file)
    return measures


def _job(place: Place, *, folder: Path, data: Mapping[str, Dataset], training: Training) -> Job:
    found = read(folder)
    method = found.method
    assert isinstance(method, Build)
    torch.manual_seed(training.seed)  # what is new starts the same on every worker
    network = built(folder, found, torch.float32, (EXPERTS,))
    known = {*Weights(folder, EXPERTS).headers, *(n for n, _ in outline(member(folder, 0)).named_parameters())}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in known)
    objective, sets = looking(network, Model(str(folder)), method.objective, data, training.length)
    balanced = Balanced(sets, method.batch_size, training.seed)

    def export(weights: Mapping[str, Tensor], target: Path) -> None:
        named = {n.removeprefix("objective.model."): w for n, w in weights.items()}
        save_file(named, target / f"{LEARNT}.safetensors")

    return Job(objective=Calm(objective), rows=balanced.rows, held_out=None, export=export, rewrite=balanced)


class Calm(nn.Module):
    """An objective whose network computes as it will when it answers: nothing is dropped out while it learns."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        """What the objective gives."""
        loss: Tensor = self.objective(batch)
        return loss

    @override
    def train(self, mode: bool = True) -> "Calm":
        return super().train(False)
