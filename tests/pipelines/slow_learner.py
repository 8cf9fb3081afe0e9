"""A line through points, learnt slowly: code of a user, whose processes say where they are."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from operators.artifact import Dataset, Model
from operators.base import operator
from operators.data.batches import Rows
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


def slowly(place: Place, folder: str, hold: int) -> Job:
    """Say where this process is, then take a while for each step."""
    import ray

    torch.manual_seed(0)
    here = {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
    said = Path(folder) / f"{place.rank}-{time.time_ns()}.new"
    said.write_text(json.dumps(here))
    said.rename(said.with_suffix(".json"))
    ids = np.random.default_rng(0).integers(0, 9, (32, 4), dtype=np.int32)
    rows = Rows(ids, np.tile(np.arange(4, dtype=np.int32), (32, 1)), ids % 5)

    def rewrite(step, where):
        time.sleep(0.02)
        while hold and step == hold and not (Path(folder) / "go").exists():
            time.sleep(0.02)
        return rows, where

    def export(weights, folder):
        (folder / "config.json").write_text("{}")
        save_file(dict(weights), folder / "model.safetensors")

    return Job(objective=Guess(), rows=rows, held_out=None, export=export, rewrite=rewrite)


@operator(starts_workers=False)
def learn(work: Workspace, *, after: Sequence[Dataset] = (), folder: str, hold: int = 0, training: Training) -> Model:
    """Fit the line; a `hold` is a step that waits until there is a file ``go``."""
    trained, _ = fit(work, slowly, {"folder": folder, "hold": hold}, training)
    return work.save(Model, trained)
