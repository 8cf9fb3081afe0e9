"""What steps measured while they worked -> curves as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.page.account import Lines, Step
from pipelines.page.markup import Markup, element, number
from pipelines.page.scales import Scale, brief, fitted, ticks, took

MAX_POINTS = 500  # of a curve: more cannot be told apart on a screen
WIDTH, LEFT, RIGHT, TOP = 440.0, 46.0, 10.0, 8.0
TALL, SMALL, BETWEEN, BELOW = 150.0, 30.0, 20.0, 30.0
MAIN_WORD = "loss"  # a measure with it in its name stands in the large part
BANDS = 60  # places at which pointing shows the values

Series = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Part:
    """One vertical axis with its curves."""

    names: tuple[str, ...]
    scale: Scale
    ticks: Sequence[float]
    top: float
    height: float


def curves(steps: Sequence[Step]) -> Markup | None:
    """A card for each step that measured something more than once; None where none did."""
    cards = [card for s in steps if (card := _card(s)) is not None]
    return element("div", cards, class_="cards") if cards else None


def series(lines: Lines) -> dict[str, Series]:
    """Each measure with what it was at which step, as far as it is a number; only those seen more than once."""
    found: dict[str, dict[float, float]] = {}
    for line in lines:
        for name, value in line.get("measures", {}).items():
            if math.isfinite(value):
                found.setdefault(name, {})[line["done"]] = value
    return {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}


def thinned(points: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points: of each of as many stretches as fit the lowest and the highest, and both ends."""
    if len(points) <= limit:
        return points
    stretches = (limit - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for i in range(stretches):
        stretch = inner[len(inner) * i // stretches : len(inner) * (i + 1) // stretches]
        low = min(range(len(stretch)), key=lambda k: stretch[k][1])
        high = max(range(len(stretch)), key=lambda k: stretch[k][1])
        kept += [stretch[k] for k in sorted({low, high})]
    return [*kept, points[-1]]


def _card(step: Step) -> Markup | None:
    measured = series(step.lines)
    if not measured:
        return None
    parts = _parts(measured)
    first = min(points[0][0] for points in measured.values())
    last = max(points[-1][0] for points in measured.values())
    bottom = parts[-1].top + parts[-1].height
    across = Scale(first, last, LEFT, WIDTH - RIGHT)
    drawing = element(
        "svg",
        [_axis(p) for p in parts],
        _below(across, bottom),
        [_line(n, measured[n], across, p) for p in parts for n in p.names],
        _bands(measured, across, bottom),
        viewBox=f"0 0 {number(WIDTH)} {number(bottom + BELOW)}",
        role="img",
        aria_label=f"{step.name}: " + "; ".join(_told(n, points) for n, points in measured.items()),
    )
    lines = step.lines
    work = f"{lines[-1]['done']} of {lines[-1]['total']} in {took(step.seconds)}" if step.attempts else "reused"
    return element(
        "figure",
        element(
            "figcaption",
            element("a", step.name, href=f"#step-{step.name}", class_="name"),
            element("span", step.verb, class_="verb"),
            element("span", work, class_="fact"),
        ),
        element("p", [_key(n, measured[n], parts[0]) for n in parts[0].names], class_="legend"),
        drawing,
        class_="card",
    )


def _parts(measured: Mapping[str, Series]) -> list[Part]:
    """Losses together in the large part, each other measure in a small one below; or the first measure in the large."""
    main = tuple(n for n in measured if MAIN_WORD in n) or tuple(measured)[:1]
    found, top, height = [], TOP, TALL
    for names in (main, *((n,) for n in measured if n not in main)):
        values = [v for n in names for _, v in measured[n]]
        scale, marks = fitted(values, top + height, top, count=5 if height == TALL else 1)
        found.append(Part(names, scale, marks, top, height))
        top, height = top + height + BETWEEN, SMALL
    return found
