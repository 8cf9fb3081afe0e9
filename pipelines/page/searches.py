"""Account -> what its searches tried: every trial across its fields, the best so far, the front, and a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from pipelines.findings import Search, Trial, search, trial_cells, value_text
from pipelines.page.account import Account, Step
from pipelines.page.curves import plain
from pipelines.page.markup import Markup, element, joined, number
from pipelines.page.scales import Scale, brief, fitted, fitted_wide, log_ticks, tick_texts, ticks

WIDE, APART, TALL = 900.0, 70.0, 220.0
SIDE, TOP, BELOW = 50.0, 34.0, 26.0
WIDTH, LEFT, RIGHT, HEIGHT = 440.0, 52.0, 10.0, 170.0
NOT_SET = "not set"  # a field whose condition does not hold


@dataclass(frozen=True, slots=True)
class Axis:
    """One upright axis: a field or an objective, with where each trial crosses it."""

    name: str
    places: Sequence[float]
    marks: Sequence[tuple[float, str]]


def searched(account: Account) -> Markup | None:
    """A part for each search; None where there is none. A note that travels on belongs to the step that made it."""
    steps = [s for s in account.steps.values() if s.planned["operator"] == "search"]
    found = [(s, one) for s in steps if (one := search(s.about)) is not None]
    return joined([_part(step, one) for step, one in found]) if found else None


def _part(step: Step, one: Search) -> Markup:
    failed = sum(t.state == "failed" for t in one.trials)
    said = f"{len(one.trials)} trials, {failed} failed" if failed else f"{len(one.trials)} trials"
    best = next(t for t in one.trials if t.best)
    values = ", ".join(f"{plain(n)} {brief(v)}" for n, v in zip(one.objectives, best.values, strict=True))
    cards = [_so_far(one), _front(one) if len(one.objectives) > 1 else None]
    return element(
        "div",
        element("h3", element("a", step.name, href=f"#step-{step.name}"), f" {said}; the best has {values}"),
        _across(one),
        element("div", cards, class_="cards"),
        _table(one),
        class_="search",
    )


def _across(one: Search) -> Markup:
    """Parallel coordinates: an axis for each field and each objective, a line for each trial."""
    names = (*one.fields, *one.objectives)
    width = max(WIDE, 2 * SIDE + APART * len(names))
    apart = (width - 2 * SIDE) / max(1, len(names) - 1)
    axes = [axis_of(k, [t.changes.get(k) for t in one.judged]) for k in one.fields]
    axes += [axis_of(n, [t.values[i] for t in one.judged]) for i, n in enumerate(one.objectives)]
    across = [SIDE + i * apart for i in range(len(axes))]
    order = sorted(range(len(one.judged)), key=lambda i: (one.judged[i].best, one.judged[i].unbeaten))
    drawing = element(
        "svg",
        [_upright(axis, x, last=i >= len(one.fields)) for i, (axis, x) in enumerate(zip(axes, across, strict=True))],
        [
            _way(one, one.judged[i], [(x, a.places[i]) for a, x in zip(axes, across, strict=True)])
            for i in order  # the best one last, so that nothing lies over it
        ],
        viewBox=f"0 0 {number(width)} {number(TOP + TALL + BELOW)}",
        role="img",
        aria_label=f"Trials across {', '.join(map(plain, names))}",
    )
    return element("figure", _legend(one), drawing, class_="card")


def _legend(one: Search) -> Markup:
    kinds = [("best", "the best by " + plain(one.objectives[0]))]
    kinds += [("unbeaten", "no other is as good in all and better in one")] if len(one.objectives) > 1 else []
    kinds += [("tried", "others")]
    return element("p", [element("span", _sample(kind), said) for kind, said in kinds], class_="legend")


def _sample(kind: str) -> Markup:
    line = element("path", d="M0 5H22", class_=f"trial {kind}")
    return element("svg", line, viewBox="0 0 22 10", class_="sample", aria_hidden="true")


def axis_of(name: str, values: Sequence[Any]) -> Axis:
    """Where values lie: numbers on a scale, anything else one above the other."""
    bottom, top = TOP + TALL, TOP
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if numbers and all(v is None or v in numbers for v in values):
        lowest = bottom - 18 if None in values else bottom
        scale = fitted_wide(numbers, lowest, top)
        marks = (log_ticks if scale.logarithmic else ticks)(scale.low, scale.high, 4)
        texts = [brief(m) for m in marks] if scale.logarithmic else tick_texts(marks)
        placed = [(scale.at(m), t) for m, t in zip(marks, texts, strict=True)]
        return Axis(name, _places(values, scale, bottom), placed + ([(bottom, NOT_SET)] if None in values else []))
    texts = sorted({_word(v) for v in values})
    steps = {t: bottom - (i + 0.5) * TALL / len(texts) for i, t in enumerate(texts)}
    return Axis(name, [steps[_word(v)] for v in values], [(y, t) for t, y in steps.items()])


def _places(values: Sequence[Any], scale: Scale, bottom: float) -> list[float]:
    return [bottom if v is None else scale.at(v) for v in values]


def _word(value: Any) -> str:
    return NOT_SET if value is None else value_text(value)


def _upright(axis: Axis, x: float, *, last: bool) -> Markup:
    marks = [element("text", text, x=x + 5, y=y + 3.5) for y, text in axis.marks]
    return element(
        "g",
        element("path", class_="base", d=f"M{number(x)} {number(TOP)}V{number(TOP + TALL)}"),
        element(
            "text", plain(axis.name), class_="what goal" if last else "what", x=x, y=TOP - 12, text_anchor="middle"
        ),
        marks,
        class_="axis",
    )


def _way(one: Search, trial: Trial, points: Sequence[tuple[float, float]]) -> Markup:
    path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return element("g", element("title", _told(one, trial)), element("path", d=path, class_=f"trial {_kind(trial)}"))


def _kind(trial: Trial) -> str:
    return "best" if trial.best else "unbeaten" if trial.unbeaten else "tried"


def _told(one: Search, trial: Trial) -> str:
    changes = [f"{k} {value_text(v)}" for k, v in trial.changes.items()]
    values = [f"{plain(n)} {brief(v)}" for n, v in zip(one.objectives, trial.values, strict=True)]
    return "\n".join([f"trial {one.trials.index(trial)}", *changes, *values])


def _so_far(one: Search) -> Markup:
    """The first objective of each trial in order, and the best of those up to it."""
    points = [(one.trials.index(t), t.values[0]) for t in one.judged]
    better = min if one.signs[0] > 0 else max
    best = list(accumulate((v for _, v in points), better))
    down = fitted_wide([v for _, v in points], HEIGHT, TOP)
    across = Scale(0, max(1, len(one.trials) - 1), LEFT, WIDTH - RIGHT)
    places = [(across.at(i), down.at(v)) for i, v in points]
    steps = "".join(f"H{number(x)}V{number(down.at(v))}" for (x, _), v in zip(places, best, strict=True))
    start = f"M{number(places[0][0])} {number(down.at(best[0]))}"
    name = plain(one.objectives[0])
    return element(
        "figure",
        element("figcaption", element("span", f"{name}: the best so far", class_="fact")),
        element(
            "svg",
            _left(down),
            _bottom(across, "trial", whole=True),
            element("g", element("path", d=f"{start}{steps}H{number(WIDTH - RIGHT)}"), class_="curve c0"),
            [_dot(one, t, *place) for t, place in zip(one.judged, places, strict=True)],
            viewBox=f"0 0 {number(WIDTH)} {number(HEIGHT + BELOW)}",
            role="img",
            aria_label=f"{name} from {brief(best[0])} to {brief(best[-1])} in {len(one.trials)} trials",
        ),
        class_="card",
    )


def _front(one: Search) -> Markup:
    """The first two objectives against each other, and a line through what no other trial beats."""
    first, second = (plain(n) for n in one.objectives[:2])
    across = fitted([t.values[0] for t in one.judged], LEFT, WIDTH - RIGHT)
    down = fitted([t.values[1] for t in one.judged], HEIGHT, TOP)
    places = {t.run: (across.at(t.values[0]), down.at(t.values[1])) for t in one.judged}
    unbeaten = sorted(places[t.run] for t in one.judged if t.unbeaten)
    line = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in unbeaten)
    return element(
        "figure",
        element("figcaption", element("span", f"{second} against {first}: the front", class_="fact")),
        element(
            "svg",
            _left(down),
            _bottom(across, first, whole=False),
            element("g", element("path", d=line), class_="curve c2"),
            [_dot(one, t, *places[t.run]) for t in one.judged],
            viewBox=f"0 0 {number(WIDTH)} {number(HEIGHT + BELOW)}",
            role="img",
            aria_label=f"{second} against {first}: {len(unbeaten)} of {len(places)} trials are unbeaten",
        ),
        class_="card",
    )


def _dot(one: Search, trial: Trial, x: float, y: float) -> Markup:
    radius = 4 if trial.best else 2.5
    return element(
        "g", element("title", _told(one, trial)), element("circle", cx=x, cy=y, r=radius), class_=f"dot {_kind(trial)}"
    )


def _left(down: Scale) -> Markup:
    marks = (log_ticks if down.logarithmic else ticks)(down.low, down.high, 5)
    texts = [brief(m) for m in marks] if down.logarithmic else tick_texts(marks)
    lines = [
        (
            element("path", class_="tick", d=f"M{number(LEFT)} {number(y)}H{number(WIDTH - RIGHT)}"),
            element("text", text, x=LEFT - 6, y=y + 3.5, text_anchor="end"),
        )
        for y, text in zip(map(down.at, marks), texts, strict=True)
    ]
    return element("g", lines, class_="axis")


def _bottom(across: Scale, what: str, *, whole: bool) -> Markup:
    marks = [m for m in ticks(across.low, across.high, 5) if not whole or m == round(m)]
    return element(
        "g",
        element("path", class_="base", d=f"M{number(LEFT)} {number(HEIGHT)}H{number(WIDTH - RIGHT)}"),
        [
            element("text", text, x=across.at(m), y=HEIGHT + 14, text_anchor="middle")
            for m, text in zip(marks, tick_texts(marks), strict=True)
        ],
        element("text", what, class_="what", x=WIDTH - RIGHT, y=HEIGHT + 25, text_anchor="end"),
        class_="axis",
    )


def _table(one: Search) -> Markup:
    names = ("trial", *one.fields, *map(plain, one.objectives), "state", "took", "ran", "reused", "")
    rows = [
        element(
            "tr",
            element("th", str(i), element("small", trial.run.rpartition("~")[2]), scope="row"),
            [element("td", cell) for cell in trial_cells(one, trial)],
            class_="chosen" if trial.best else None,
        )
        for i, trial in enumerate(one.trials)
    ]
    head: Mapping[str, object] = {"scope": "col"}
    return element(
        "div",
        element(
            "table",
            element("thead", element("tr", [element("th", n, **head) for n in names])),
            element("tbody", rows),
            class_="trials",
        ),
        class_="scroll fit",
        tabindex="0",
        role="region",
        aria_label="Trials, scrolls",
    )
