r"""The kept figures of a folder -> their sections of `RESULTS.md` beside this file; the other sections stay.

for name in training_throughput step_cost distillation_memory first_batch journal plan_size scale verified_copy \
    merging search_overhead evolutionary_merging; do
.venv/bin/python benchmarks/$name.py --json figures/$name.json
done
.venv/bin/python benchmarks/memory_estimates.py --json figures/memory_estimates.json
.venv/bin/python benchmarks/seeds.py --json figures/seeds.json
.venv/bin/python benchmarks/results.py figures

`make results DATA=folder` does it for `real_data`, which keeps a file for each configuration.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from real_data import spread

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

Written by `benchmarks/results.py` from what the scripts keep, a section for each script or configuration.

What a script measures of this project's own speed and size is a ratio to a baseline that was measured in the same run,
in turns with it: the median over the rounds, with the lowest and the highest of a round. What `real_data` measures of
methods is the mean ± the standard deviation over seeds.
"""
COLUMNS = ("what", "measured", "baseline", "ratio", "lowest to highest", "aim")
ROWS = ("method", "what", "measured", "baseline", "better in", "a word")


def section(name: str, kept: Mapping[str, Any]) -> Iterator[str]:
    """One script's lines."""
    versions = ", ".join(f"{k} {v}" for k, v in kept["versions"].items())
    yield f"## {name}\n\n{kept['date']}, {kept['machine']}, Python {kept['python']}, {versions}."
    yield f"One-minute load at the end, this run's own included: {kept['load']}.\n"
    if "device" in kept:
        yield f"Computed on: {kept['device']}.\n"
    if "figures" in kept:
        yield from table(COLUMNS, [figure(f) for f in kept["figures"]])
    if kept.get("remarks"):
        yield from ("", *(f"- {remark}" for remark in kept["remarks"]))
    if "rows" in kept:
        yield f"{kept['setting']}; seeds {', '.join(map(str, kept['options']['seeds']))}.\n"
        yield from table(ROWS, [row(r) for r in kept["rows"]])
    if "stages" in kept:
        yield from ("", *stages(kept["stages"]))
    for seed, found in kept.get("seeds", {}).items():
        yield from (f"- seed {seed} {'holds' if c['holds'] else 'FAILS'}: {c['said']}" for c in found["gate"])
    if kept.get("grid"):
        yield from ("", *grid(kept["grid"]))


def figure(of: Mapping[str, Any]) -> tuple[str, ...]:
    """A figure's cells."""
    return (
        of["what"],
        f"{of['value']:.4g} {of['unit']}",
        f"{of['baseline']}: {of['baseline_value']:.4g} {of['unit']}",
        f"**{of['ratio']:.3g}**",
        f"{of['low']:.3g} to {of['high']:.3g} in {of['rounds']}",
        of["aim"],
    )


def row(of: Mapping[str, Any]) -> tuple[str, ...]:
    """A row's cells."""
    beside = of["beside"]
    return (
        of["method"],
        of["what"],
        f"**{spread(of['values'])}**",
        f"{of['baseline']}: {spread(beside)}" if beside else "",
        of["wins"],
        of["why"],
    )


def stages(kept: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Seconds by stage."""
    names = sorted(
        {n for seconds in kept.values() for n in seconds}, key=lambda n: -max(s.get(n, 0) for s in kept.values())
    )
    yield from table(("stage", *kept), [(n, *(f"{s.get(n, 0.0):.3f} s" for s in kept.values())) for n in names])


def grid(kept: Mapping[str, Any]) -> Iterator[str]:
    """Held-out loss by learning rate."""
    students = kept["losses"]
    rates = next(iter(students.values()))
    rows = [(rate, *(f"{by_rate[rate]:.4f}" for by_rate in students.values())) for rate in rates]
    yield from table(("learning rate", *students), rows)
    yield f"\nThe best of each: {'holds' if kept['holds'] else 'FAILS'}: {kept['said']}"


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Markdown."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def sections(text: str) -> dict[str, str]:
    """A page's sections by name."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {name: f"## {name}{rest.rstrip()}" for name, rest in zip(parts[1::2], parts[2::2], strict=True)}


def page(before: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The page `before` with the sections of these scripts anew."""
    anew = {name: "\n".join(section(name, kept)) for name, kept in figures.items()}
    every = sections(before) | anew
    return "\n\n".join([HEAD.rstrip(), *(every[name] for name in sorted(every))]) + "\n"


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the scripts' JSON files")
    asked = parser.parse_args()
    figures = {path.stem: json.loads(path.read_text()) for path in asked.folder.glob("*.json")}
    RESULTS.write_text(page(RESULTS.read_text() if RESULTS.is_file() else "", figures))


if __name__ == "__main__":
    main()
