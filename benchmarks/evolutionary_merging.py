"""CMA-ES over a merge's weights and density, against uniform weights and a grid, at an equal number of evaluations.

The experts are the main recipe's, two LoRA adapters of a distilled student: of a run that the store has (`--run`), or
made by `lfm run`, at a smaller size unless `--full`. Each candidate is TIES (PEFT's arithmetic) of both with a weight
for each and one density. What a search looks at is the mean held-out loss of both tasks on one half of their held-out
rows; what is told is that on the other half. `uniform` gives both experts the weight 1 and tries as many densities,
`grid` every point of an even grid.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipeline_runs import typed
from rounds import command_line, compared, said
from torch import Tensor

from lfm.merging.ties import TIES
from operators.artifact import Adapter, Model
from operators.data.batches import Rows, on_device
from operators.merges.experts import opened, reader
from operators.models.language_models import load, load_tokenizer
from operators.models.objectives import NextToken
from operators.models.texts import packed_rows
from operators.searches.sampling import Course, searcher
from operators.searches.space import Dimension, Extent, Objective
from operators.training import Training
from pipelines.lineage import find_run, history, new_run, states
from pipelines.storage.opening import open_storage
from pipelines.store import Store

RECIPE = "distill_lora_merge_serve"
EXPERTS, TASKS = ("describer", "namer"), ("summaries_held_out", "names_held_out")
SPACE = {
    "weight_0": Dimension(uniform=(0.0, 2.0)),
    "weight_1": Dimension(uniform=(0.0, 2.0)),
    "density": Dimension(uniform=(0.05, 1.0)),
}
LOSS = Objective(measure="loss", direction="minimize")
SMALL = (
    *(f"{step}.{field}" for step in ("teacher", "student") for field in ("layers=2", "width=64", "heads=2")),
    "teacher.vocabulary=1024",
    "teacher.max_steps=300",
    "distilled.max_steps=300",
    *(f"{step}.epochs=1" for step in EXPERTS),
    *(f"{step}.max_rows=1200" for step in ("summaries_train", "names_train")),
    *(f"{step}.max_rows=96" for step in TASKS),
)
UNIFORM, GRID, CMA = "uniform weights", "grid", "CMA-ES"

Point = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Merges:
    """Merged models to look at: a base and its experts in memory, and each task's rows in two halves."""

    network: Any
    base: Mapping[str, Tensor]
    experts: Mapping[str, Tensor]
    halves: Sequence[Sequence[Rows]]

    def loss(self, point: Point, half: int) -> float:
        """The mean over the tasks of the mean loss of their tokens in one half."""
        weights = (point["weight_0"], point["weight_1"])
        method = TIES(convention="peft", density=point["density"], weights=weights)
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(method.merge(name, self.base[name], self.experts[name], {}))
            objective = NextToken(self.network, packed=False)
            return float(np.mean([_mean(objective, rows) for rows in self.halves[half]]))


def _mean(objective: NextToken, rows: Rows) -> float:
    batches = np.array_split(np.arange(len(rows)), -(-len(rows) // 32))
    return float(sum(objective(on_device(rows, where, torch.device("cpu"))) for where in batches)) / rows.loss_tokens


def uniform(number: int) -> list[Point]:
    """The same weight for both, at as many densities."""
    return [{"weight_0": 1.0, "weight_1": 1.0, "density": float(d)} for d in np.linspace(0.05, 1.0, number)]


def grid(number: int) -> list[Point]:
    """The points of the largest even grid of no more; no weight of it is 0, which leaves an expert out."""
    side = math.floor(number ** (1 / 3) + 1e-9)
    axes = [np.linspace(*(d.bounds or ()), side + 1)[1:] for d in SPACE.values()]
    return [dict(zip(SPACE, map(float, values), strict=True)) for values in itertools.product(*axes)]


def evolved(number: int, seed: int, loss: Callable[[Point], float]) -> list[tuple[float, Point]]:
    """What CMA-ES tries, as `search` with ``sampler: cma_es`` does, with the loss of each."""
    course = Course(sampler="cma_es", seed=seed, extent=Extent(num_trials=number), concurrency=1)
    search = searcher(SPACE, ["loss"], [LOSS], course)
    found: list[tuple[float, Point]] = []
    for i in range(number):
        point = search.suggest(f"trial-{i}")
        found.append((loss(point), point))
        search.on_trial_complete(f"trial-{i}", result={"loss": found[-1][0], "training_iteration": 1})
    return found


def found_in(store: str, run: str) -> Mapping[str, Any]:
    """A run's base, experts and held-out rows."""
    storage = open_storage(store)
    events = history(storage, find_run(storage, run))
    ended, kept = states(events, events[0].data["steps"]), Store(storage)
    return {name: kept.get(ended[name].data["digest"]) for name in ("distilled", *EXPERTS, *TASKS)}


def made(store: str, changes: Sequence[str]) -> str:
    """Run the recipe up to its merge; what the store has is reused."""
    storage, run = open_storage(store), new_run("evolved")
    words = ["run", RECIPE, "--store", storage.uri, "--mlflow", "none", "--as", run, "--until", "merged_measured"]
    code = typed([*words, *(word for change in changes for word in ("--set", change))], Path())
    if code:
        raise SystemExit(f"{RECIPE}: lfm run ended with {code}.")
    return run


def merges(found: Mapping[str, Any], length: int, most: int) -> Merges:
    """Everything in memory."""
    base: Model = found["distilled"]
    source, tokenizer = opened("base", base), load_tokenizer(base.path)
    network = load(base.path).float().eval()
    here = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    experts: list[Adapter] = [found[name] for name in EXPERTS]
    opens = [reader(name, expert, base, source) for name, expert in zip(EXPERTS, experts, strict=True)]

    def values(name: str, of: Any) -> Tensor:
        out = torch.empty_like(here[name])
        with of(name) as write:
            write(0, here[name].flatten(), out.view(-1))
        return out

    stacked = {name: torch.stack([values(name, of) for of in opens]) for name in here}
    rows = [packed_rows(found[task], tokenizer, Training(length=length, packing=False)) for task in TASKS]
    halves = [[_every_other(of, half, most) for of in rows] for half in (0, 1)]
    return Merges(network=network, base=here, experts=stacked, halves=halves)


def _every_other(rows: Rows, first: int, most: int) -> Rows:
    where = slice(first, 2 * most, 2)
    return Rows(ids=rows.ids[where], positions=rows.positions[where], targets=rows.targets[where])


def best_elsewhere(of: Merges, tried: Sequence[tuple[float, Point]]) -> tuple[float, Point]:
    """The loss on the other half of the point that was the best on the first one."""
    _, point = min(tried, key=lambda one: one[0])
    return of.loss(point, 1), point


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=3)
    parser.add_argument("--evaluations", type=int, default=64, help="of each way")
    parser.add_argument("--store", default=".lfm", help="where the experts are kept and reused")
    parser.add_argument("--run", default="", help="a run of the recipe that the store has; without one it is run")
    parser.add_argument("--full", action="store_true", help="the recipe as it is written")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1000, help="of each half of a task, at most")
    asked = parser.parse_args()
    run = asked.run or made(asked.store, () if asked.full else SMALL)
    of = merges(found_in(asked.store, run), asked.length, asked.rows)
    print(f"base alone: {of.loss({'weight_0': 0.0, 'weight_1': 0.0, 'density': 1.0}, 1):.4f}")
    values: dict[str, list[float]] = {}
    for name, points in ((UNIFORM, uniform(asked.evaluations)), (GRID, grid(asked.evaluations))):
        loss, point = best_elsewhere(of, [(of.loss(one, 0), one) for one in points])
        print(f"{name}, the best of {len(points)}: {loss:.4f} at {_said(point)}", flush=True)
        values[name] = [loss] * asked.rounds
    values[CMA] = []
    for seed in range(asked.rounds):
        loss, point = best_elsewhere(of, evolved(asked.evaluations, seed, lambda one: of.loss(one, 0)))
        print(f"{CMA}, seed {seed}: {loss:.4f} at {_said(point)}", flush=True)
        values[CMA].append(loss)
    label = f"held-out loss of the merge that {asked.evaluations} evaluations by {CMA} find"
    figures = [compared(values, CMA, other, unit="nats", label=label, aim="< 1") for other in (UNIFORM, GRID)]
    said(figures, asked)


def _said(point: Point) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in point.items())


if __name__ == "__main__":
    main()
