"""A line through points, learnt slowly: code of a user, whose processes say where they are."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from operators.artifact import Dataset, Model
from operators.base import operator
from operators.data.batches import Rows
from operators.learning import elastic
from operators.learning.learner import Place
from operators.learning.loop import Job
from operators.learning.trainer import fit
from operators.training import Training
from operators.workspace import Workspace


class Guess(nn.Module):
    """How far each token's number is from a line through its place."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, batch):
        known = torch.stack([batch.positions.float(), batch.ids.float()], dim=-1)
        return ((self.line(known).squeeze(-1) - batch.targets.float()) ** 2).sum()


def slowly(place: Place, folder: str) -> Job:
    """Say where this process is, then take a while for each step, and at some as long as a file says."""
    import ray

    here = {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
    said = Path(folder) / f"{place.rank}-{time.time_ns()}.new"
    said.write_text(json.dumps(here))
    said.rename(said.with_suffix(".json"))

    def wait(step: int) -> None:
        time.sleep(0.02)
        while (Path(folder) / f"wait-{step}").exists():
            time.sleep(0.02)

    return line(wait)


def line(wait: Callable[[int], None]) -> Job:
    """What is learnt, where each step waits."""
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, 9, (32, 4), dtype=np.int32)
    rows = Rows(ids, np.tile(np.arange(4, dtype=np.int32), (32, 1)), ids % 5)

    def rewrite(step, where):
        wait(step)
        return rows, where

    def export(weights, folder):
        (folder / "config.json").write_text("{}")
        save_file(dict(weights), folder / "model.safetensors")

    return Job(objective=Guess(), rows=rows, held_out=None, export=export, rewrite=rewrite)


@operator(starts_workers=False)
def learn(work: Workspace, *, after: Sequence[Dataset] = (), folder: str, training: Training) -> Model:
    """Fit the line; where its workers may be more, it does not take a minute to see that there is room."""
    elastic.LOOK_S, elastic.GROW_S = 0.5, 0.5
    trained, _ = fit(work, slowly, {"folder": folder}, training)
    return work.save(Model, trained)
