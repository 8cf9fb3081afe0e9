"""Rivals measured in turns, and what is said of them: the median of each and its ratio to a named baseline."""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "ray", "transformers", "peft")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One thing that was measured beside its baseline.

    Attributes:
        what: What was measured.
        unit: Of `value` and `baseline_value`.
        value: Its median over the rounds.
        baseline: What it is compared with.
        baseline_value: That one's median.
        ratio: The median over rounds of `value / baseline_value`: what slows a whole round down drops out of it.
        low: The lowest ratio of a round.
        high: The highest.
        rounds: How many there were.
        aim: What it should be, in words; empty where nothing is promised.
    """

    what: str
    unit: str
    value: float
    baseline: str
    baseline_value: float
    ratio: float
    low: float
    high: float
    rounds: int
    aim: str = ""


def interleaved(
    rivals: Mapping[str, Callable[[int], float]], rounds: int, *, until: float = math.inf
) -> dict[str, list[float]]:
    """Let each rival measure itself once per round; who goes first changes, so that nobody always follows the same.

    Args:
        rivals: Called with the round's number, each gives one value.
        rounds: How many rounds.
        until: No round but the first begins that would not be over then, by `time.monotonic`, if it took as long as
            those before.
    """
    names = list(rivals)
    found: dict[str, list[float]] = {n: [] for n in names}
    began = time.monotonic()
    for number in range(rounds):
        if number and time.monotonic() + (time.monotonic() - began) / number > until:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(rivals[name](number))
    return found


def compared(
    values: Mapping[str, Sequence[float]], what: str, baseline: str, *, unit: str, label: str = "", aim: str = ""
) -> Figure:
    """The figure of one rival; `label` says more of it than the name that it has in `values`."""
    one, other = values[what], values[baseline]
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return Figure(
        what=label or what,
        unit=unit,
        value=statistics.median(one),
        baseline=baseline,
        baseline_value=statistics.median(other),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        rounds=len(ratios),
        aim=aim,
    )


def command_line(what: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help="how often each rival is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep the figures")
    return parser


def said(figures: Sequence[Figure], asked: argparse.Namespace, **more: Any) -> None:
    """Print figures, and keep them, and `more`, where a file is named."""
    for figure in figures:
        told(figure)
    keep(asked, figures=[asdict(f) for f in figures], **more)


def told(f: Figure) -> None:
    """Print a figure."""
    spread = f"{f.low:.3g} to {f.high:.3g} in {f.rounds} rounds"
    print(f"{f.what}: {f.value:.4g} {f.unit}, {f.baseline}: {f.baseline_value:.4g} {f.unit}")
    print(f"    ratio {f.ratio:.3g} ({spread})" + (f"; aim {f.aim}" if f.aim else ""), flush=True)


def keep(asked: argparse.Namespace, **found: Any) -> None:
    """Write what was found, with what was asked for, machine and versions, where a file is named."""
    if asked.json is not None:
        options = {k: v for k, v in vars(asked).items() if k != "json"}
        asked.json.write_text(json.dumps({**found, "options": options, **surroundings()}, indent=2, default=str) + "\n")


def surroundings() -> dict[str, Any]:
    """Where and when this was measured, and how busy the machine was with other things."""
    return {
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "date": f"{datetime.now(tz=UTC):%Y-%m-%d}",
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # a script that needs it says so
            yield name, version(name)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
