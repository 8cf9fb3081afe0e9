"""A pipeline with a search, whose steps compute next to nothing: a number, a move of it, and how far it is off."""

OWN = '''
"""Operators that move a number, and that say how far it is from where it should be."""

import json
from pathlib import Path

from operators.artifact import Dataset, Metrics, Model
from operators.base import operator
from operators.workspace import Workspace


def written(work: Workspace, number: float) -> Path:
    path = work.scratch / "number.json"
    path.write_text(json.dumps(number))
    return path


@operator()
def begun(work: Workspace, *, at: float = 0.0, touch: str = "") -> Model:
    """A number; each time that it is made, a letter is written."""
    if touch:
        with Path(touch).open("a") as file:
            file.write("x")
    return work.save(Model, written(work, at))


@operator()
def moved(work: Workspace, *, model: Model, by: float = 1.0, times: int = 1, refused: int = 99) -> Model:
    """Another number; a large move goes on for ever."""
    work.progress(16, 16, away=by)
    while by > 5:
        pass
    if times == refused:
        raise ValueError("asked to fail")
    return work.save(Model, written(work, json.loads((model.path / "number.json").read_text()) + by * times))


@operator()
def judge(work: Workspace, *, model: Model, wanted: float = 3.0) -> Metrics:
    """How far the number is from another, and how large it is."""
    found = json.loads((model.path / "number.json").read_text())
    about = {"sets": {"text": {"documents": 1, "loss": abs(found - wanted)}}, "size": found}
    return work.save(Metrics, written(work, found), about)
'''

PIPELINE = """
name: sought
uses: [sought.py]
steps:
  base: {operator: begun, params: {touch: TOUCH}}
  part: {operator: moved, inputs: {model: base}}
  score: {operator: judge, inputs: {model: part}}
  found:
    operator: search
    inputs: {result: part, judged: score}
    params:
      space: {part.by: {uniform: [0.5, 2.0]}, part.times: {choice: [1, 2, 4]}}
      objectives: [{on: text, measure: loss, direction: minimize}]
      num_trials: 6
      concurrency: 2
  after: {operator: judge, inputs: {model: found}}
"""


def write(folder):
    """The pipeline in a folder; returns the file that tells how often its base was made."""
    made = folder / "made"
    (folder / "sought.py").write_text(OWN)
    (folder / "pipeline.yaml").write_text(PIPELINE.replace("TOUCH", str(made)))
    return made
