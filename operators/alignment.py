"""The verb `align`: one model's hidden units come into the order of another's, so that both can be averaged."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm.alignment.base import Align, PermutationSpec, declared
from lfm.errors import LfmError
from lfm.networks import ImageNetwork, statistics_of
from lfm.weights import Weights, Writer
from operators.artifact import Model
from operators.base import operator
from operators.data.facts import carry
from operators.models import classifiers, networks
from operators.models.alike import other_tensors
from operators.models.changed_models import opened
from operators.models.language_models import architecture_of, copy_settings, outline, same
from operators.needs import unmet
from operators.workspace import Workspace

Named = tuple[str, int] | tuple[str, int, int]
"""A tensor, one of its axes, and how many places in a row a unit has there; 1 where nothing is said."""


class AlignmentError(LfmError, ValueError):
    """Models that cannot be aligned, with everything that is known to keep them from it, a clause each."""

    def __init__(self, clauses: tuple[str, ...]) -> None:
        super().__init__(clauses)
        self.clauses = clauses

    def __str__(self) -> str:
        return "\n".join(self.clauses)


def _foreseen(
    *,
    base: Model | None,
    model: Model | None,
    method: Align,
    groups: Mapping[str, Sequence[Named]] | None = None,
    **_: object,
) -> Iterator[str]:
    found = {where: one.path for where, one in (("base", base), ("model", model)) if one is not None}
    yield from unmet(method, models=2, architectures=[architecture_of(folder) for folder in found.values()])
    for where, folder in found.items():
        if architecture_of(folder) == "encoder":
            yield f"{where}: {str(folder)!r} is an encoder: {classifiers.HEADLESS}. {classifiers.GIVE_HEAD}"
            return
    try:
        if base is not None and model is not None:
            yield from _unlike(model, base)
        for folder in [*found.values()][-1:]:
            spec_of(folder, method, groups)
    except LfmError as problem:
        yield str(problem)


def _unlike(model: Model, base: Model) -> Iterator[str]:
    fix = "Align models of one architecture."
    return other_tensors(f"model {model.uri!r}", model.path, "the base", base.path, fix)


def spec_of(folder: Path, method: Align, groups: Mapping[str, Sequence[Named]] | None) -> PermutationSpec:
    """Which axes of a model's tensors move together; reads headers only.

    Raises:
        LfmError: Nothing is declared and the model is no plain chain, or what is declared does not fit it.
    """
    network = networks.outline(folder) if networks.is_network(folder) else None
    if groups is not None:
        shapes = {name: header.shape for name, header in Weights(folder).headers.items()}
        return declared(groups, shapes, [] if network is None else statistics_of(network))
    return method.groups(outline(folder) if network is None else network)


@operator(problems=_foreseen)
def align(
    work: Workspace,
    *,
    base: Model,
    model: Model,
    method: Align,
    groups: Mapping[str, tuple[Named, ...]] | None = None,
) -> Model:
    """Permute a model's hidden units so that it comes as near to another as it can; it says the same as before.

    Both are held in memory. A network whose layers follow one another needs nothing else; of one with attention or a
    residual stream the groups of units have to be declared. Whether it says the same then is looked at.

    Args:
        work: The step's workspace.
        base: The model that stays.
        model: The one that is permuted, of the same architecture.
        method: How the order is found.
        groups: By a name of each group its axes, each as a tensor's name, the number of the axis from 0, and how many
            places in a row each unit has there, 1 by default (of a head of attention its width).

    Raises:
        AlignmentError: The models differ in more than the values of their tensors, or groups are declared after whose
            permutation the model says something else.
        GroupError: It is no plain chain and nothing is declared, or what is declared does not fit.
        UnknownName: There is no tensor of a name that is declared.
    """
    if wrong := tuple(_unlike(model, base)):
        raise AlignmentError(wrong)
    spec = spec_of(model.path, method, groups)
    ours, theirs = Weights(base.path), Weights(model.path)
    touched = {axis.tensor for axes in spec.groups.values() for axis in axes}
    a, b = ({name: weights.read(name) for name in sorted(touched)} for weights in (ours, theirs))
    draw = torch.Generator().manual_seed(work.seed)
    found = method.solve(a, b, spec, draw)
    aligned = found.apply(b)
    folder = work.scratch / "aligned"
    folder.mkdir()
    with Writer(folder, theirs.headers) as out:
        for name in theirs.headers:
            out.write(name, aligned[name] if name in touched else theirs.read(name))
    copy_settings(model.path, folder)
    carry([model.path], folder)
    _check(model, Model(str(folder)))
    before, after = (_distance(a, tensors, spec) for tensors in (b, aligned))
    work.progress(1, 1, distance=after)
    about = {"method": type(method).__name__, "moved": found.moved(), "distance_before": before, "distance": after}
    return work.save(Model, folder, about)


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], spec: PermutationSpec) -> float:
    """How far two models are from each other, over all parameters that a permutation touches."""
    parts = [(a[n].double() - b[n].double()).square().sum() for n in a if n not in spec.carried]
    return float(torch.stack(parts).sum().sqrt())


@torch.no_grad()
def _check(model: Model, aligned: Model) -> None:
    """Ask both the same.

    Raises:
        AlignmentError: They do not say the same.
    """
    one, other = (_said(opened("align", each, None)[0]) for each in (model, aligned))
    if not same(other, one):
        fix = "Declare every axis along which the units of a group lie."
        clause = f"groups: with these permuted, the model says something else, expected what it said before. {fix}"
        raise AlignmentError((clause,))


def _said(model: Any) -> Tensor:
    """A model's logits for something that is made up."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(model, ImageNetwork):
        said: Tensor = model(torch.rand(8, *model.shape, generator=draw))
        return said
    vocabulary = model.get_input_embeddings().num_embeddings
    logits: Tensor = model(input_ids=torch.randint(vocabulary, (2, 8), generator=draw)).logits
    return logits.float()
