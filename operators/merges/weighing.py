"""Experts and text without labels -> how much of each expert a merge takes, learnt by gradient before it begins."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from lfm.merging.base import Merge, Weigh
from lfm.weights import Weights
from operators.artifact import Dataset, Model
from operators.data.batches import Batch
from operators.learning.loop import Job, Place
from operators.learning.trainer import fit
from operators.learning.unlabelled import Balanced, looking, training_of, unsuited
from operators.merges.experts import Expert, called, reader
from operators.merges.known import Learnt, learnt_before
from operators.models import classifiers
from operators.models.language_models import architecture_of, load, other_names
from operators.needs import unmet
from operators.training import Training
from operators.workspace import Workspace

LEARNT = "learnt.safetensors"


def unweighable(base: Model | None, data: Mapping[str, Dataset | None], method: Merge, length: int) -> Iterator[str]:
    """What headers tell against learning from these data, a clause each; what is None cannot be looked at yet."""
    yield from unmet(method, data=bool(data))
    if not isinstance(method, Weigh):
        return
    yield from unsuited(base, data, length)


def weighed(
    work: Workspace,
    *,
    base: Model,
    experts: Sequence[Expert],
    data: Mapping[str, Dataset],
    method: Weigh,
    length: int,
) -> Learnt:
    """Learn the coefficients in the loop that trains everything else; several workers each see a part of a batch.

    Every process holds the base and what each expert adds to it, in float32.

    Args:
        work: The step's workspace.
        base: What all experts were fine-tuned from.
        experts: What is weighed.
        data: Text by the name of its task. Of each set every step takes as many rows; labels are not read.
        method: What is learnt, and how.
        length: Tokens of a row; what is longer loses its end, or is cut where it is a language model's.

    Raises:
        UnsupportedModel: The model's files name its parameters otherwise than transformers does.
    """
    training = training_of(method, num_sets=len(data), length=length, seed=work.seed)
    arguments = {"base": base, "experts": tuple(experts), "data": dict(data), "method": method, "training": training}
    groups = method.groups(_floats(Weights(base.path)), layer_of)
    used = learnt_before(work.kept())  # by an attempt that had begun to merge
    if used is None:
        resources = replace(work.resources, strategy="ddp" if work.resources.most > 1 else "single")
        folder, _ = fit(work, _job, arguments, training, resources)
        used = method.coefficients(load_file(folder / LEARNT)["learnt"])
    return Learnt(groups, dict(zip(dict.fromkeys(groups.values()), used, strict=True)))


def _job(
    place: Place,
    *,
    base: Model,
    experts: Sequence[Expert],
    data: Mapping[str, Dataset],
    method: Weigh,
    training: Training,
) -> Job:
    opened = classifiers.load if architecture_of(base.path) == "classifier" else load
    model = opened(base.path, torch.float32)
    surest, sets = looking(model, base, method.objective, data, training.length)
    balanced = Balanced(sets, method.batch_size, training.seed)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        save_file(dict(weights), folder / LEARNT)

    return Job(
        objective=Merged(surest, method, base, experts, place.device),
        rows=balanced.rows,
        held_out=None,
        export=export,
        rewrite=balanced,
    )


class Merged(nn.Module):
    """An objective of the merged model as a function of the coefficients; nothing else in it learns.

    Attributes:
        learnt: What the coefficients are made of, a row for each group.
    """

    def __init__(
        self,
        objective: nn.Module,
        method: Weigh,
        base: Model,
        experts: Sequence[Expert],
        device: torch.device,
    ) -> None:
        super().__init__()
        source = Weights(base.path)
        readers = [reader(called(i, expert), expert, base, source) for i, expert in enumerate(experts)]
        names = _floats(source)
        groups = method.groups(names, layer_of)
        rows = {group: i for i, group in enumerate(dict.fromkeys(groups.values()))}
        self.method = method
        self.learnt = nn.Parameter(method.start(len(experts), len(rows)))
        # In a list: it is no part of what is trained, moved, saved or told to train, which would bring dropout back.
        self.objective = [objective.to(device).eval().requires_grad_(False)]
        self.row: dict[str, int] = {}
        self.base: dict[str, Tensor] = {}
        self.deltas: dict[str, Tensor] = {}
        for name in _used(objective, base, names):
            value = source.read(name).float()
            self.row[name], self.base[name] = rows[groups[name]], value.to(device)
            deltas = torch.empty((len(readers), *value.shape))
            for read, delta in zip(readers, deltas, strict=True):
                with read(name) as values:
                    values(0, value, delta)
            self.deltas[name] = deltas.sub_(value).to(device)

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's rows, or positions."""
        used = self.method.coefficients(self.learnt)
        merged = {
            f"model.{name}": self.method.combine(self.base[name], deltas, used[self.row[name]])
            for name, deltas in self.deltas.items()
        }
        return functional_call(self.objective[0], merged, (batch,))  # type: ignore[no-any-return]


def layer_of(name: str) -> str:
    """The block that a parameter is in, else the part that holds it: ``h.3`` of ``h.3.attn.weight``."""
    block = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0] or name


def _floats(source: Weights) -> tuple[str, ...]:
    return tuple(name for name, header in source.headers.items() if header.dtype.is_floating_point)


def _used(objective: nn.Module, base: Model, names: Sequence[str]) -> list[str]:
    """The parameters that the model computes with; one that is tied to another counts once."""
    used = [name.removeprefix("model.") for name, _ in objective.named_parameters()]
    lacking = next((name for name in used if name not in names), None)
    if lacking is not None:
        raise other_names(base.path, lacking)
    return used
