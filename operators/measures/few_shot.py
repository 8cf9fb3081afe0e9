"""How well a model does tasks that it was given a few examples of, episode by episode."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lfm.errors import LfmError
from lfm.meta.base import Meta, told as logits_of
from operators.artifact import Adapter, Artifact, Dataset
from operators.data.episodes import Drawn, FewShot
from operators.models.adapters import read_adapter
from operators.models.few_shot import FORMS, Tasks, adapting, asked_of, tasks_of, unfit_episodes, with_ways
from operators.models.language_models import CALLED, Architecture, UnsupportedModel, architecture_of, config_of
from operators.models.texts import unfit
from operators.needs import unmet
from operators.training import Training

Z = 1.96  # of a normal distribution 95 % lie within so many standard deviations


@dataclass(frozen=True, slots=True)
class Episodes:
    """A data set, and the episodes that are drawn from it."""

    tasks: Tasks
    drawn: Sequence[Drawn]


class Adapted:
    """What a model costs, and how often it is right, after a method has adapted it to each episode's support."""

    def __init__(
        self, model: Any, home: Path, method: Meta, few_shot: FewShot, *, episodes: int, seed: int, length: int
    ) -> None:
        """Args are those of `evaluate`.

        Raises:
            UnsupportedModel: Nothing of it adapts: it is no network, and has no LoRA.
        """
        self.model, self.home, self.method, self.few_shot = model, home, method, few_shot
        self.episodes, self.seed, self.length = episodes, seed, length
        if architecture_of(home) == "network":
            with_ways(model, few_shot.ways, seed)
        self.asked = asked_of(model)
        self.parameters = adapting(self.asked)
        if not self.parameters:
            kind = str(config_of(home).get("model_type"))
            raise UnsupportedModel(kind, "nothing of it adapts, expected LoRA on it", "Give what meta_train made.")

    def read(self, dataset: Dataset) -> Episodes:
        """A set's episodes: of one seed the same, whatever model they are for."""
        tasks = tasks_of(self.model, self.home, dataset, self.few_shot, self.length)
        return Episodes(tasks, [tasks.deck.draw(self.seed, i) for i in range(self.episodes)])

    def work(self, rows: Episodes) -> int:
        """See `operators.measures.measure.Measure`."""
        return len(rows.drawn)

    def digest(self, rows: Episodes) -> str:
        """See `operators.measures.measure.Measure`."""
        return rows.tasks.digest(rows.drawn)

    def measured(
        self, name: str, rows: Episodes, told: Callable[..., None]
    ) -> tuple[dict[str, list[Any]], dict[str, float]]:
        """See `operators.measures.measure.Measure`; the documents are episodes."""
        found = []
        for drawn in rows.drawn:
            found.append(self._one(rows.tasks, drawn))
            told(1)
        loss, tokens, accuracy = (np.array(values) for values in zip(*found, strict=True))
        columns = {"loss": loss.tolist(), "tokens": tokens.tolist(), "accuracy": accuracy.tolist()}
        means = {
            "loss": float(loss.sum() / tokens.sum()),
            "accuracy": float(accuracy.mean()),
            "accuracy_half_width": float(Z * accuracy.std(ddof=1) / len(accuracy) ** 0.5),
        }
        told(0, **{f"{name}_{k}": v for k, v in means.items()})
        return columns, means

    @torch.no_grad()
    def _one(self, tasks: Tasks, drawn: Drawn) -> tuple[float, int, float]:
        """The query's summed loss, its number of targets, and the share of these that are the likeliest."""
        episode = tasks.episode(drawn, next(iter(self.parameters.values())).device)
        adapted = self.method.adapt(self.asked, self.parameters, episode.support, training=False)
        logits, targets = logits_of(self.asked, adapted, episode.query), episode.query.targets
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        right = (logits.argmax(dim=1) == targets).double().mean()
        return loss.item(), len(targets), right.item()


def unmeasurable(
    home: Path | None,
    adapter: Adapter | None,
    kinds: Mapping[str, Sequence[type[Artifact]]],
    method: Meta,
    few_shot: FewShot,
    data: Mapping[str, Dataset | None],
    *,
    length: int,
    others: Collection[str],
) -> Iterator[str]:
    """What headers tell against measuring a model in episodes, a clause each.

    Args:
        home: The folder with the config; None where it is not here yet.
        adapter: What is measured, where it is that and is here.
        kinds: Of what the step is given.
        method: What adapts the model.
        few_shot: What an episode is made of.
        data: The sets by name.
        length: Tokens of a row.
        others: Parameters that are given, and that have no meaning for an episode.
    """
    besides = [*others, *(name for name in ("memory", "datastore") if name in kinds)]
    yield from (f"{name}: given with episodes, for which it has no meaning. Leave it out." for name in besides)
    given = kinds["model"][0]
    what: Architecture | None = "decoder" if given is Adapter else None
    if home is not None:
        what = architecture_of(home)
        yield from unfit(Training(length=length), home, {})
        if what not in FORMS:
            allowed = " or ".join(CALLED[known] for known in FORMS)
            yield f"model: {str(home)!r} is {CALLED[what]}, expected {allowed}. Give another."
        elif what == "decoder" and given is not Adapter:
            yield f"model: {CALLED[what]} without an adapter, expected one that meta_train made. Give its adapter."
    if adapter is not None:
        try:
            read_adapter(adapter.path)
        except LfmError as error:
            yield f"model: {error}"
    if what is not None and what in FORMS:
        yield from unmet(method, architectures=[what], called="model")
        yield from unfit_episodes(what, method, few_shot)
        yield from unfit(Training(length=length), None, {f"data {n!r}": d for n, d in data.items()}, (FORMS[what],))
