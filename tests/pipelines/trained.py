"""A pipeline with a population, whose step trains one number in a few steps: how far it gets, its rate decides."""

OWN = '''
"""An operator that trains a number towards another, and one that says how far it is from there."""

import json

import numpy as np
import torch
from torch import nn

from operators.artifact import Metrics, Model
from operators.base import operator
from operators.data.batches import Rows
from operators.learning.loop import Job
from operators.learning.trainer import fit, refused
from operators.training import Training
from operators.workspace import Workspace


class Away(nn.Module):
    def __init__(self):
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1, 1))

    def forward(self, batch):
        return (self.number - 3).square().sum()


def job(place, *, training):
    ids = np.ones((2, 2), dtype=np.int32)

    def export(weights, folder):
        (folder / "number.json").write_text(json.dumps(weights["number"].item()))

    rows = Rows(ids=ids, positions=ids, targets=np.array([[1, -100], [1, -100]], dtype=np.int32))
    return Job(objective=Away(), rows=rows, held_out=None, export=export)


def foreseen(*, training, resources, **_):
    yield from refused(training, resources)


@operator(problems=foreseen)
def pulled(work: Workspace, *, training: Training) -> Model:
    """Train."""
    folder, measures = fit(work, job, {"training": training}, training)
    return work.save(Model, folder, measures)


@operator()
def judge(work: Workspace, *, model: Model) -> Metrics:
    """How far the number is."""
    found = json.loads((model.path / "number.json").read_text())
    path = work.scratch / "found.json"
    path.write_text(json.dumps(found))
    return work.save(Metrics, path, {"sets": {"text": {"loss": abs(found - 3)}}})
'''

PIPELINE = """
name: trained
uses: [trained.py]
steps:
  part:
    operator: pulled
    params: {max_steps: 6, batch_size: 2, learning_rate: 0.01, schedule: constant, warmup: 0, clip_norm: null}
  score: {operator: judge, inputs: {model: part}}
  found:
    operator: search
    inputs: {result: part, judged: score}
    params:
      space: {part.learning_rate: {log_uniform: [0.001, 1.0]}}
      objectives: [{on: text, measure: loss, direction: minimize}]
      sampler: random
      seed: 1
      num_trials: 3
      concurrency: 2
      population: {step: part, every: 2, last: 4}
"""


def write(folder):
    """The pipeline in a folder."""
    (folder / "trained.py").write_text(OWN)
    (folder / "pipeline.yaml").write_text(PIPELINE)
