"""Whether the recipe's claims hold on several seeds, and whether both students' learning rates are tuned alike.

Runs `distill_lora_merge_serve` up to its gate once per seed, and both students at every learning rate of one grid.
Hours at full size; what is in the store is reused, so that it goes on where it was interrupted.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline_runs import measured, sets_of
from rounds import keep

from operators.artifact import Metrics
from operators.gating import Requirement, compared, holds, said
from pipelines.files import opened

RECIPE, GATE = "distill_lora_merge_serve", "passed"
SPEC = opened(RECIPE).spec
SEEDED = tuple(n for n, s in SPEC.steps.items() if "seed" in s.params)
STUDENTS = {"undistilled": "undistilled_measured", "distilled": "student_measured"}
MEASURES = ("loss", "perplexity", "exact_match", "chrf")

# As small as it can be: that it runs, not what comes of it.
QUICK = (
    *(f"{step}.max_rows=60" for step in ("summaries_train", "names_train")),
    *(f"{step}.max_rows=8" for step in ("text_held_out", "summaries_held_out", "names_held_out")),
    "text_train.max_rows=100",
    *(f"{step}.{field}" for step in ("teacher", "student") for field in ("layers=1", "width=16", "heads=2")),
    "teacher.vocabulary=400",
    *(f"{step}.max_steps=2" for step in ("teacher", "undistilled", "distilled", "describer", "namer")),
)


class Recipe:
    """The recipe with some changes on one store."""

    def __init__(self, store: str, changes: Sequence[str]) -> None:
        self.store, self.changes = store, tuple(changes)

    def measured(self, until: str, *changes: str) -> dict[str, Metrics]:
        """Every evaluation that the step `until` needs, or is, by its step's name; the gate may be closed."""
        return measured(RECIPE, self.store, (*self.changes, *changes), until=until, may_fail=(GATE,))


def numbers(evaluations: Mapping[str, Metrics]) -> Iterator[tuple[str, float]]:
    """What was measured, by ``step set measure``."""
    for step, metrics in evaluations.items():
        for name, values in sets_of(metrics).items():
            for measure in MEASURES:
                if measure in values:
                    yield f"{step.removesuffix('_measured')} {name} {measure}", values[measure]


def gate(evaluations: Mapping[str, Metrics], require: Sequence[Requirement]) -> list[dict[str, Any]]:
    """The gate's comparisons, whether or not it opened."""
    edges = SPEC.steps[GATE].inputs["results"]
    assert isinstance(edges, Mapping)
    results = {name: evaluations[step] for name, step in edges.items()}
    found = [(r, compared(r, results)) for r in require]
    return [{**asdict(r), **asdict(d), "holds": holds(r, d), "said": said(r, d)} for r, d in found]


def on_seeds(recipe: Recipe, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Run all of it once for each seed."""
    require = [Requirement(**r) for r in SPEC.steps[GATE].params["require"]]  # type: ignore[attr-defined]
    found = {}
    for seed in seeds:
        changes = [f"{step}.seed={seed}" for step in SEEDED]
        evaluations = {**recipe.measured("teacher_measured", *changes), **recipe.measured(GATE, *changes)}
        found[seed] = {"held_out": dict(numbers(evaluations)), "gate": gate(evaluations, require)}
    return found


def on_grid(recipe: Recipe, rates: Sequence[float]) -> dict[str, Any]:
    """Both students at every rate, and the best of each against each other."""
    losses: dict[str, dict[float, float]] = {name: {} for name in STUDENTS}
    metrics: dict[str, dict[float, Metrics]] = {name: {} for name in STUDENTS}
    for rate in rates:
        for name, step in STUDENTS.items():
            evaluation = recipe.measured(step, f"{name}.learning_rate={rate}", f"{step}.generate=0")[step]
            metrics[name][rate] = evaluation
            losses[name][rate] = dict(numbers({name: evaluation}))[f"{name} text loss"]
    best = {name: min(by_rate, key=by_rate.__getitem__) for name, by_rate in losses.items()}
    asked = Requirement(better="distilled", than="undistilled", on="text")
    difference = compared(asked, {name: metrics[name][rate] for name, rate in best.items()})
    return {"losses": losses, "best": best, "said": said(asked, difference), "holds": holds(asked, difference)}


def shown_seeds(found: Mapping[int, Mapping[str, Any]]) -> None:
    """Print a table with a column for each seed."""
    print(f"\n{'held out':44}" + "".join(f"{f'seed {seed}':>12}" for seed in found))
    for key in next(iter(found.values()))["held_out"]:
        print(f"{key:44}" + "".join(f"{f['held_out'][key]:12.4f}" for f in found.values()))
    print("\ndifferences with their 95 % intervals")
    for seed, f in found.items():
        for line in f["gate"]:
            print(f"seed {seed} {'holds' if line['holds'] else 'FAILS'}: {line['said']}")


def shown_grid(grid: Mapping[str, Any]) -> None:
    """Print a table with a row for each learning rate."""
    print(f"\n{'held-out loss of text, learning rate':44}" + "".join(f"{name:>16}" for name in STUDENTS))
    for rate in next(iter(grid["losses"].values())):
        marked = {n: f"{grid['losses'][n][rate]:.4f}{'*' if grid['best'][n] == rate else ' '}" for n in STUDENTS}
        print(f"{rate:<44g}" + "".join(f"{marked[n]:>16}" for n in STUDENTS))
    used = {n: SPEC.steps[n].params["learning_rate"] for n in STUDENTS}
    print(f"* the best; the recipe's own: {used}")
    print(f"the best of each: {'holds' if grid['holds'] else 'FAILS'}: {grid['said']}")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 2e-3, 4e-3], help="of the grid")
    parser.add_argument("--store", default=".lfm", help="where results are kept and reused")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="changes", help="as in lfm run")
    parser.add_argument("--quick", action="store_true", help="tiny models and two learning rates: only that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep what was found")
    asked = parser.parse_args()
    recipe = Recipe(asked.store, (*(QUICK if asked.quick else ()), *asked.changes))
    seeds = on_seeds(recipe, asked.seeds)
    grid = on_grid(recipe, asked.rates[:2] if asked.quick else asked.rates) if asked.rates else None
    if seeds:
        shown_seeds(seeds)
    if grid:
        shown_grid(grid)
    keep(asked, seeds=seeds, grid=grid)


if __name__ == "__main__":
    main()
