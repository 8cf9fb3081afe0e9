"""What a trial of `search` costs beside what its steps compute, against bare Ray Tune with the same objective.

The objective is how far a number is from another. A trial of bare Ray Tune is a call of a function; one of `search` is
a run of two steps, planned, journaled and committed to a store. Both draw with Optuna's TPE, on one Ray, one trial at a
time; each trial of the search has other values, so that nothing is reused.
"""

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import command_line, compared, interleaved, said
from warm_ray import driven

from cluster.connect import cluster

OWN = '''
"""Operators that write a number, and that say how far it is from another."""

import json

from operators.artifact import Metrics, Model
from operators.base import operator
from operators.workspace import Workspace


@operator()
def numbered(work: Workspace, *, x: float = 0.0) -> Model:
    """A number."""
    (work.scratch / "number.json").write_text(json.dumps(x))
    return work.save(Model, work.scratch / "number.json")


@operator()
def judge(work: Workspace, *, model: Model) -> Metrics:
    """How far it is."""
    found = json.loads(model.path.joinpath("number.json").read_text())
    (work.scratch / "found.json").write_text(json.dumps(found))
    return work.save(Metrics, work.scratch / "found.json", {"away": abs(found - 3.0)})
'''
PIPELINE = """
name: overhead
uses: [overhead.py]
steps:
  part: {operator: numbered}
  score: {operator: judge, inputs: {model: part}}
  found:
    operator: search
    inputs: {result: part, judged: score}
    params:
      space: {part.x: {uniform: [-10.0, 10.0]}}
      objectives: [{measure: away, direction: minimize}]
      sampler: tpe
      seed: NUMBER
      num_trials: TRIALS
      concurrency: 1
"""
OURS, BARE = "a trial of search", "bare Ray Tune"


def ours(home: Path, number: int, trials: int) -> float:
    """Seconds of a step that searches, for each trial."""
    path = home / "overhead.yaml"
    path.write_text(PIPELINE.replace("NUMBER", str(number)).replace("TRIALS", str(trials)))
    _, events = driven(path, home / f"store-{number}")
    (seconds,) = (e.data["seconds"] for e in events if e.kind == "commit" and e.step == "found")
    return float(seconds) / trials


def bare(home: Path, number: int, trials: int) -> float:
    """Seconds of a search with the same objective in a function, for each trial."""
    from optuna.samplers import TPESampler
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    def objective(config: dict[str, Any]) -> None:
        tune.report({"away": abs(config["x"] - 3.0)})

    searcher = OptunaSearch(metric="away", mode="min", sampler=TPESampler(seed=number))
    began = time.perf_counter()
    tune.Tuner(
        tune.with_resources(objective, {"CPU": 1}),
        param_space={"x": tune.uniform(-10.0, 10.0)},
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=1), num_samples=trials, reuse_actors=True
        ),
        run_config=tune.RunConfig(name=f"bare-{number}", storage_path=str(home / "bare"), verbose=0),
    ).fit()
    return (time.perf_counter() - began) / trials


def measured(asked: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds for each trial, by round."""
    with tempfile.TemporaryDirectory(prefix="search-") as folder, cluster("local"):
        home = Path(folder)
        (home / "overhead.py").write_text(OWN)
        for number in range(2):  # Ray has a worker for each CPU, which import at first what they need
            ours(home, asked.rounds + number, 1)
        rivals = {
            OURS: lambda number: ours(home, number, asked.trials),
            BARE: lambda number: bare(home, number, asked.trials),
        }
        return interleaved(rivals, asked.rounds)


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=5)
    parser.add_argument("--trials", type=int, default=20)
    asked = parser.parse_args()
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    values = measured(asked)
    label = f"{OURS}, of {asked.trials} one after the other"
    said([compared(values, OURS, BARE, unit="s", label=label)], asked)


if __name__ == "__main__":
    main()
