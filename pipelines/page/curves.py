"""What steps measured while they worked -> curves as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.page.account import Lines, Step
from pipelines.page.markup import Markup, element, number
from pipelines.page.scales import Scale, brief, fitted, fitted_wide, log_ticks, tick_texts, ticks, took

MAX_POINTS = 500  # of a curve: more cannot be told apart on a screen
WIDTH, LEFT, RIGHT, TOP = 440.0, 46.0, 10.0, 8.0
TALL, SMALL, BETWEEN, BELOW = 150.0, 28.0, 22.0, 18.0
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

    @property
    def tall(self) -> bool:
        """Whether it is the large part."""
        return self.height == TALL


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
    if step.state == "running":
        last = max(last, step.lines[-1]["total"])  # room for what is still to come
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
        if height == TALL:
            scale = fitted_wide(values, top + height, top)
            marks = (log_ticks if scale.logarithmic else ticks)(scale.low, scale.high, 5)
        else:
            scale = fitted(values, top + height, top)
            marks = sorted({min(values), max(values)})
        found.append(Part(names, scale, marks, top, height))
        top, height = top + height + BETWEEN, SMALL
    return found


def _axis(part: Part) -> Markup:
    """Ticks with their lines, and what the part shows where the legend above does not say it."""
    texts = (
        tick_texts(part.ticks)
        if part.tall and not part.scale.logarithmic
        else [brief(t, 4 if part.tall else 2) for t in part.ticks]
    )
    marks = [
        (
            element("path", class_="tick", d=f"M{number(LEFT)} {number(y)}H{number(WIDTH - RIGHT)}"),
            element("text", text, x=LEFT - 6, y=y + 3.5, text_anchor="end"),
        )
        for tick, text in zip(part.ticks, texts, strict=True)
        for y in (part.scale.at(tick),)
    ]
    notes = [] if part.tall else [plain(n) for n in part.names]
    notes += ["logarithmic"] if part.scale.logarithmic else []
    above = element("text", ", ".join(notes), class_="what", x=LEFT, y=part.top - 5) if notes else None
    return element("g", marks, above, class_="axis")


def _below(across: Scale, bottom: float) -> Markup:
    """The axis of the step's own steps, which all parts share."""
    base = element("path", class_="base", d=f"M{number(LEFT)} {number(bottom)}H{number(WIDTH - RIGHT)}")
    marks = [
        element("text", f"{tick:.0f}", x=across.at(tick), y=bottom + 14, text_anchor="middle")
        for tick in ticks(across.low, across.high, 6)
        if tick == round(tick)
    ]
    what = element("text", "step", class_="what", x=LEFT - 12, y=bottom + 14, text_anchor="end")
    return element("g", base, marks, what, class_="axis")


def _line(name: str, points: Series, across: Scale, part: Part) -> Markup:
    thin = thinned(points, MAX_POINTS if part.tall else MAX_POINTS // 2)
    places = [(across.at(x), part.scale.at(y)) for x, y in thin]
    path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in places)
    dots = [element("circle", cx=x, cy=y, r=2) for x, y in places] if _dotted(points, part) else []
    return element("g", element("path", d=path), dots, class_=f"curve {_style(name, part)}")


def _dotted(points: Series, part: Part) -> bool:
    """Whether there are so few points that each is marked."""
    return len(points) <= BANDS and part.tall


def _style(name: str, part: Part) -> str:
    return f"c{part.names.index(name) % 4}" if part.tall else "small"


def _bands(measured: Mapping[str, Series], across: Scale, bottom: float) -> list[Markup]:
    """Upright stripes that say what was measured there when somebody points at them."""
    inside: list[dict[str, list[tuple[float, float]]]] = [{} for _ in range(BANDS)]
    for name, points in measured.items():
        for point in points:
            share = (point[0] - across.low) / (across.high - across.low)
            inside[min(int(share * BANDS), BANDS - 1)].setdefault(name, []).append(point)
    width = (across.end - across.start) / BANDS
    return [
        element(
            "g",
            element("title", _said(found)),
            element("rect", x=across.start + i * width, y=TOP, width=width, height=bottom - TOP),
            class_="band",
        )
        for i, found in enumerate(inside)
        if found
    ]


def _said(found: Mapping[str, Series]) -> str:
    steps = [x for points in found.values() for x, _ in points]
    first, last = min(steps), max(steps)
    at = f"step {first:.0f}" if first == last else f"steps {first:.0f} to {last:.0f}"
    return "\n".join([at, *(f"{plain(n)} {_span([y for _, y in points])}" for n, points in found.items())])


def _span(values: Sequence[float]) -> str:
    low, high = brief(min(values)), brief(max(values))
    return low if low == high else f"{low} to {high}"


def _key(name: str, points: Series, part: Part) -> Markup:
    """An entry of the legend: the line, its name and where it ended."""
    dot = element("circle", cx=11, cy=5, r=2) if _dotted(points, part) else None
    sample = element("g", element("path", d="M0 5H22"), dot, class_=f"curve {_style(name, part)}")
    lowest = min(points, key=lambda p: p[1])
    also = f" (lowest {brief(lowest[1])} at {lowest[0]:.0f})" if lowest[0] != points[-1][0] else ""
    return element(
        "span",
        element("svg", sample, viewBox="0 0 22 10", class_="sample", aria_hidden="true"),
        element("span", f"{plain(name)} ", element("b", brief(points[-1][1])), also),
    )


def _told(name: str, points: Series) -> str:
    low = min(points, key=lambda p: p[1])
    return (
        f"{plain(name)} from {brief(points[0][1])} at step {points[0][0]:.0f} to {brief(points[-1][1])} "
        f"at step {points[-1][0]:.0f}, lowest {brief(low[1])} at step {low[0]:.0f}"
    )


def plain(name: str) -> str:
    """A measure's name in words."""
    return name.replace("_", " ")
