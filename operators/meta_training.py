"""The verb `meta_train`: a model learns how to learn, from many tasks of a few examples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfm.meta.base import Meta
from lfm.networks import ImageNetwork
from lfm.tuning.lora import LoRA
from operators.artifact import Adapter, Artifact, Dataset, Model
from operators.base import operator
from operators.data.batches import IGNORED, Batch, Rows
from operators.data.episodes import Drawn, FewShot
from operators.data.facts import carry
from operators.learning.loop import Job, Place, Where
from operators.learning.trainer import fit, refused
from operators.models import networks
from operators.models.few_shot import FORMS, Tasks, adapting, asked_of, tasks_of, unfit_episodes, with_ways
from operators.models.language_models import CALLED, Architecture, architecture_of, save, stored_dtype
from operators.models.texts import unfit
from operators.needs import unmet
from operators.resources import Resources
from operators.training import Training
from operators.tuning import learner
from operators.workspace import Workspace

TWICE = "eager"  # the attention that has second derivatives: the default one has none on a CPU
LOOKED_AT = 64  # episodes of the held-out data, the same at each look


def _foreseen(
    *,
    model: Model | None,
    data: Dataset | None,
    held_out: Dataset | None,
    method: Meta,
    lora: LoRA | None,
    few_shot: FewShot,
    training: Training,
    resources: Resources,
    **_: object,
) -> Iterator[str]:
    yield from refused(training, resources, method)
    if training.max_steps is None:
        yield "max_steps=None, expected a number: episodes are drawn without an end. Say how many steps."
    if training.precision != "float32":
        yield f"precision={training.precision!r}, expected 'float32': second derivatives are small. Leave it out."
    if training.gradient_checkpointing:
        yield "gradient_checkpointing=True, expected false within episodes. Lower micro_batch_size instead, down to 1."
    what: Architecture = "network" if lora is None else "decoder"
    if model is not None:
        yield from unfit(training, model.path, {})
        yield from _unlike(model.path, what)
    yield from unmet(method, architectures=[what], called="model")
    yield from unfit_episodes(what, method, few_shot)
    if lora is not None and lora.dropout:
        yield f"lora: dropout={lora.dropout}, expected 0, as an episode has none. Leave it out."
    yield from unfit(training, None, {"data": data, "held_out": held_out}, (FORMS[what],))


def _unlike(folder: Path, what: Architecture) -> Iterator[str]:
    """Whether a model is another one than `lora` says, by being there or not."""
    is_one = architecture_of(folder)
    if is_one not in FORMS:
        allowed = " or ".join(CALLED[known] for known in FORMS)
        yield f"model: {str(folder)!r} is {CALLED[is_one]}, expected {allowed}. Give another."
    elif is_one != what and is_one == "decoder":
        yield f"lora: none with {CALLED[is_one]}, expected what of it learns. Write it, as lora: {{rank: 8}}."
    elif is_one != what:
        yield f"lora: given with {CALLED[is_one]}, all of which learns, expected none. Leave it out."


def _makes(params: Mapping[str, object]) -> type[Artifact]:
    return Model if params.get("lora") is None else Adapter


@operator(problems=_foreseen, kind=_makes)
def meta_train(
    work: Workspace,
    *,
    model: Model,
    data: Dataset,
    held_out: Dataset | None = None,
    method: Meta,
    lora: LoRA | None = None,
    few_shot: FewShot,
    training: Training,
) -> Model | Adapter:
    """Train a network, or what LoRA adds to a decoder, so that it learns a new task from a few examples.

    An episode has examples of some labels of `data` to adapt to and others to ask then; what is learnt is where
    adapting begins. It depends on the seed, the step and its number alone, not on who computes it. Batch normalisation
    takes the statistics of the examples at hand, within an episode and in tests; those that a network has seen before
    stay as they were. Dropout is off.

    Args:
        work: The step's workspace.
        model: Where it starts. A network that tells another number of labels than `ways` gets a new head.
        data: For a network images with labels, of which every episode draws some; for a decoder texts with labels, each
            of which is a task of its own: to say what follows in texts of that label.
        held_out: Examples of other labels, of which the same 64 episodes are looked at while it trains.
        method: How a task is learnt, and what is learnt of all of them.
        lora: What of a decoder learns and adapts; the result is an adapter then. A network has none and learns whole.
        few_shot: What an episode is made of.
        training: How it is trained: a row of it is an episode, so that `batch_size` is the number of tasks in a step.

    Raises:
        DatasetError: There are too few labels, or too few examples of one.
    """
    arguments = {
        "model": model,
        "data": data,
        "held_out": held_out,
        "method": method,
        "lora": lora,
        "few_shot": few_shot,
        "training": replace(training, packing=False),
    }
    folder, measures = fit(work, _job, arguments, training)
    if lora is None:
        return work.save(Model, folder, measures)
    carry([model.path], folder)
    return work.save(Adapter, folder, {"base": model.digest, **measures})


@dataclass(frozen=True, slots=True)
class EpisodeRows(Rows):
    """A row for each episode, whose targets are those of its query.

    Attributes:
        drawn: The episodes.
        tasks: What they were drawn from.
    """

    drawn: Sequence[Drawn] = field(kw_only=True)
    tasks: Tasks = field(kw_only=True)


def episode_rows(tasks: Tasks, drawn: Sequence[Drawn]) -> EpisodeRows:
    """Rows for the loop."""
    targets = np.stack([tasks.targets(one.query) for one in drawn])
    nothing = np.zeros_like(targets)
    return EpisodeRows(nothing, nothing, targets, drawn=drawn, tasks=tasks)


class NextEpisodes:
    """Draws the episodes of each step, the same on every rank."""

    def __init__(self, tasks: Tasks, seed: int) -> None:
        self.tasks, self.seed = tasks, seed

    def __call__(self, step: int, where: Where) -> tuple[Rows, Where]:
        """See `Job.rewrite`."""
        drawn = [self.tasks.deck.draw(self.seed, step, i) for i in range(len(where))]
        return episode_rows(self.tasks, drawn), np.arange(len(where))


class OuterLoss(nn.Module):
    """What tasks cost after a model has adapted to each.

    Attributes:
        model: What learns; between two calls only the optimizer changes it.
    """

    def __init__(self, model: nn.Module, method: Meta) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the queries' targets."""
        assert isinstance(batch.rows, EpisodeRows)
        parameters = adapting(self.model)
        # Every parameter takes part, also of a worker without work, and where the method has no use for it: ddp waits.
        total = torch.stack([p.sum() * 0.0 for p in parameters.values()]).sum()
        for row, targets in zip(batch.where, batch.targets, strict=True):
            if (targets != IGNORED).any():
                episode = batch.rows.tasks.episode(batch.rows.drawn[row], targets.device)
                adapted = self.method.adapt(self.model, parameters, episode.support, training=self.training)
                total = total + self.method.outer(self.model, adapted, episode.query)
        return total


def _job(
    place: Place,
    *,
    model: Model,
    data: Dataset,
    held_out: Dataset | None,
    method: Meta,
    lora: LoRA | None,
    few_shot: FewShot,
    training: Training,
) -> Job:
    whole: Any
    if lora is None:
        whole = with_ways(networks.load(model.path), few_shot.ways, training.seed)
    else:
        whole = learner(model.path, lora, training, place)
        whole.get_base_model().set_attn_implementation(TWICE)
    objective = OuterLoss(asked_of(whole), method)

    def tasks(dataset: Dataset) -> Tasks:
        return tasks_of(whole, model.path, dataset, few_shot, training.length)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        if isinstance(whole, ImageNetwork):
            named = {n.removeprefix("model."): w for n, w in weights.items()}
            networks.save(whole, named, [str(i) for i in range(few_shot.ways)], folder)
        else:
            named = {n.removeprefix("model.model."): w for n, w in weights.items()}
            save(whole, named, folder, tokenizer=model.path, dtype=stored_dtype(model.path))

    learnt = tasks(data)
    seen = None
    if held_out is not None:
        others = tasks(held_out)
        seen = episode_rows(others, [others.deck.draw(training.seed, i) for i in range(LOOKED_AT)])
    return Job(
        objective=objective,
        rows=learnt.rows,
        held_out=seen,
        export=export,
        rewrite=NextEpisodes(learnt, training.seed),
    )
