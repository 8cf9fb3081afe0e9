"""The papers' methods on real data: runs the configurations of `experiments.py` for some seeds, and keeps their rows.

    make results DATA=folder    # all of it, and RESULTS.md

Each configuration is run by `lfm run`, once for each seed. The store keeps every step, so that what was interrupted
goes on with the same command, and a second one computes nothing anew.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from experiments import EXPERIMENTS, Experiment, Figure, Row
from pipeline_runs import Command, measured, sets_of, typed
from rounds import keep

from operators.artifact import Metrics
from pipelines.__main__ import ROOT
from pipelines.files import opened

CONFIGURATIONS = Path(__file__).parent / "configurations"
FIRST = "seed_0"  # in a configuration's inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A row's numbers, one for each seed; none beside them where there is no baseline."""

    row: Row
    values: Sequence[float]
    beside: Sequence[float]

    @property
    def wins(self) -> str:
        """In how many seeds the method did better than its baseline; nothing where it should do the same."""
        if self.row.better == "same" or not self.beside:
            return ""
        sign = 1 if self.row.better == "higher" else -1
        won = sum(sign * (a - b) > 0 for a, b in zip(self.values, self.beside, strict=True))
        return f"{won} of {len(self.beside)}"

    def told(self) -> dict[str, Any]:
        """Everything that a table tells of it, as plain values."""
        fields = {k: v for k, v in asdict(self.row).items() if k not in ("measured", "beside")}
        return {**fields, "values": self.values, "beside": self.beside, "wins": self.wins}


def seeded(configuration: Path, seed: int) -> list[str]:
    """What a seed changes of a configuration, as `lfm run` takes it with ``--set``."""
    raw = yaml.safe_load(configuration.read_text())
    written = {name: step.get("params") or {} for name, step in raw["steps"].items()}
    steps = opened(str(configuration)).spec.steps
    # Without a method an evaluation draws nothing.
    drawn = [n for n, s in steps.items() if "seed" in s.params and (s.method or s.operator != "evaluate")]
    changes = [f"{name}.params.seed={seed}" for name in drawn if "seed" not in written[name]]
    inputs = {name: uri for name, given in raw["inputs"].items() for uri in given.values() if FIRST in uri}
    return [*changes, *(f"{name}={uri.replace(FIRST, f'seed_{seed}')}" for name, uri in inputs.items())]


def run(
    experiment: Experiment,
    folder: Path,
    store: str,
    seeds: Sequence[int],
    *,
    changes: Sequence[str] = (),
    lfm: Command = typed,
) -> list[Found]:
    """An experiment's rows.

    Args:
        experiment: What is run.
        folder: Where its inputs are.
        store: Where results are kept and reused.
        seeds: Once with each.
        changes: To its configuration, besides what the seeds change.
        lfm: Runs it.
    """
    file = CONFIGURATIONS / f"{experiment.configuration}.yaml"
    runs = []
    for seed in seeds:
        print(f"\n{experiment.configuration}, seed {seed}", flush=True)
        runs.append(measured(str(file), store, [*seeded(file, seed), *changes], folder=folder, lfm=lfm))
    return [
        Found(
            row=row,
            values=[number(row.measured, one) for one in runs],
            beside=[number(row.beside, one) for one in runs if row.beside],
        )
        for row in experiment.rows
    ]


def number(figure: Figure, evaluations: Mapping[str, Metrics]) -> float:
    """A figure of one run."""
    places = (place.split(".", 1) for place in figure.places)
    return statistics.fmean(sets_of(evaluations[step])[name][figure.measure] for step, name in places)


def prepare(experiments: Iterable[Experiment], data: Path, folder: Path, seeds: Sequence[int]) -> None:
    """Write what the experiments take.

    Raises:
        SystemExit: The folder of real data does not hold what they are made of.
    """
    needed = {file for experiment in experiments for file in experiment.needs}
    if missing := sorted(file for file in needed if not (data / file).is_file()):
        raise SystemExit(f"DATA={data}: it has no {', no '.join(missing)}. Name the folder that holds these.")
    folder.mkdir(parents=True, exist_ok=True)
    for experiment in experiments:
        for name, write in experiment.data.items():
            write(data, folder / name, seeds)


def main(words: Sequence[str] | None = None, lfm: Command = typed) -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [e.configuration for e in EXPERIMENTS]
    parser.add_argument("data", type=Path, metavar="DATA", help="the folder that holds facts/, clinc150/ and omniglot/")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the configurations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--store", default=str(ROOT / ".lfm"), help="where results are kept and reused (default: .lfm)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/results", help="where inputs are written")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="where to keep what was found")
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps: only that it runs")
    asked = parser.parse_args(words)
    chosen = [e for e in EXPERIMENTS if e.configuration in asked.only]
    prepare(chosen, asked.data, asked.folder, asked.seeds)
    for experiment in chosen:
        changes = experiment.quick if asked.quick else ()
        rows = run(experiment, asked.folder, asked.store, asked.seeds, changes=changes, lfm=lfm)
        said(rows)
        if asked.figures:
            asked.figures.mkdir(parents=True, exist_ok=True)
            asked.json = asked.figures / f"real_data.{experiment.configuration}.json"
            keep(asked, setting=experiment.setting, rows=[row.told() for row in rows])


def said(rows: Iterable[Found]) -> None:
    """Print rows."""
    for f in rows:
        beside = f"; {f.row.baseline}: {spread(f.beside)}" if f.beside else ""
        print(f"{f.row.method}, {f.row.what}: {spread(f.values)}{beside}" + (f"; better in {f.wins}" if f.wins else ""))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; of one value that alone."""
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
