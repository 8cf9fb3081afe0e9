"""Account -> what its gates decided: each difference with its interval, against 0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.findings import MEASURES
from pipelines.page.account import Account, Step
from pipelines.page.curves import plain
from pipelines.page.markup import Markup, element
from pipelines.page.scales import Scale, alike, tick_texts, ticks


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One requirement of a gate, and what came out."""

    better: str
    than: str
    on: str
    measure: str
    mean: float
    low: float
    high: float
    holds: bool


def gates(account: Account) -> Markup | None:
    """A plot for each gate; None where there is none."""
    found = [(s, comparisons(s)) for s in account.steps.values() if s.planned["operator"] == "gate"]
    plots = [_plot(step, compared) for step, compared in found if compared]
    return element("div", plots) if plots else None


def comparisons(step: Step) -> list[Comparison]:
    """What a gate compared: as it noted on what it let through, else as it measured while it looked."""
    noted: Sequence[Mapping[str, Any]] = step.about.get("gate", ())
    if noted:
        return [_comparison(one, one, holds=True) for one in noted]
    required = step.planned["params"].get("require", ())
    measured = [line["measures"] for line in step.lines if "measures" in line]
    return [
        _comparison(one, values, holds=bool(values["holds"])) for one, values in zip(required, measured, strict=False)
    ]


def _comparison(one: Mapping[str, Any], values: Mapping[str, float], *, holds: bool) -> Comparison:
    return Comparison(
        better=str(one["better"]),
        than=str(one["than"]),
        on=str(one["on"]),
        measure=str(one["measure"]),
        mean=float(values["mean"]),
        low=float(values["low"]),
        high=float(values["high"]),
        holds=holds,
    )


def _plot(step: Step, compared: Sequence[Comparison]) -> Markup:
    failed = sum(not c.holds for c in compared)
    decision = f"closed: {failed} of {len(compared)} do not hold" if failed else f"open: all {len(compared)} hold"
    measures = list(dict.fromkeys(c.measure for c in compared))
    head = [
        element("th", "requirement", scope="col"),
        element("th", "difference with its 95 % interval", scope="col"),
        element("th", scope="col", class_="number", aria_label="in numbers"),
        element("th", "decision", scope="col"),
    ]
    return element(
        "table",
        element(
            "caption",
            element("a", step.name, href=f"#step-{step.name}"),
            element("span", f"gate {decision}", class_=f"verdict {'fails' if failed else 'holds'}"),
        ),
        element("thead", element("tr", head)),
        [_group(m, [c for c in compared if c.measure == m]) for m in measures],
        class_="intervals",
    )


def _group(measure: str, compared: Sequence[Comparison]) -> Markup:
    """Comparisons on one axis: differences of one measure."""
    low, high = min([0.0, *(c.low for c in compared)]), max([0.0, *(c.high for c in compared)])
    margin = (high - low) * 0.08 or 1.0
    across = Scale(low - margin, high + margin, 0.0, 100.0)
    marks = ticks(across.low, across.high, 5)
    written = alike([v for c in compared for v in (c.mean, c.low, c.high)])
    down = MEASURES.get(measure) is min
    texts = zip(marks, tick_texts(marks), strict=True)
    axis = [element("span", text, style=f"left:{across.at(t):.2f}%") for t, text in texts]
    better = "← better when lower" if down else "better when higher →"
    return element(
        "tbody",
        [_row(c, across, marks, written[3 * i : 3 * i + 3]) for i, c in enumerate(compared)],
        element(
            "tr",
            element("td", element("span", f"{plain(measure)}: {better}", class_="direction")),
            element("td", element("div", axis, class_="ruler", aria_hidden="true")),
            element("td", colspan=2),
            class_="axis",
        ),
    )


def _row(one: Comparison, across: Scale, marks: Sequence[float], written: Sequence[str]) -> Markup:
    verdict = "holds" if one.holds else "fails"
    interval = "{} [{}, {}]".format(*written)
    zero, low, mean, high = (f"{across.at(v):.2f}%" for v in (0.0, one.low, one.mean, one.high))
    plot = element(
        "svg",
        [
            element("line", class_="tick", x1=f"{across.at(t):.2f}%", x2=f"{across.at(t):.2f}%", y1=0, y2=28)
            for t in marks
        ],
        element("line", class_="zero", x1=zero, x2=zero, y1=0, y2=28),
        element("line", class_="whisker", x1=low, x2=high, y1=14, y2=14),
        [element("line", class_="whisker", x1=end, x2=end, y1=9, y2=19) for end in (low, high)],
        element("circle", cx=mean, cy=14, r=4),
        class_=f"interval {verdict}",
        role="img",
        aria_label=f"{interval}, {verdict}",
    )
    return element(
        "tr",
        element(
            "th",
            element("code", one.better),
            " better than ",
            element("code", one.than),
            " on ",
            element("code", one.on),
            scope="row",
        ),
        element("td", plot, class_="plot"),
        element("td", interval, class_="number"),
        element("td", element("span", verdict, class_=f"verdict {verdict}")),
    )
