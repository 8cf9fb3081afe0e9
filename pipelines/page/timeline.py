"""Account -> when its steps ran: a row for each, a bar for each attempt."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipelines.page.account import Account, Attempt, Step
from pipelines.page.markup import Markup, element, joined
from pipelines.page.scales import clock, time_ticks, took
from pipelines.page.states import badge, word

PAUSE = 2.5  # percent of the width that stands for the time in which no driver worked
TICKS = 10
BESIDE_PAUSE = 5.0  # percent of the width that a pause's label needs for itself


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps time onto percent of a width: the time in which some driver worked, with a narrow pause between drivers."""

    sessions: Sequence[tuple[float, float]]

    @property
    def total(self) -> float:
        """Seconds in which a driver worked."""
        return sum(ended - began for began, ended in self.sessions)

    def at(self, time: float) -> float:
        """Where a moment lies."""
        worked, pauses = 0.0, 0
        for i, (began, ended) in enumerate(self.sessions):
            if time >= began:
                worked += min(time, ended) - began
                pauses = i
        return self.place(worked, pauses)

    def place(self, worked: float, pauses: int) -> float:
        """Where a moment lies, by the seconds worked and the pauses made before it."""
        room = 100.0 - PAUSE * (len(self.sessions) - 1)
        return worked / (self.total or 1.0) * room + PAUSE * pauses

    def marks(self) -> list[tuple[float, str]]:
        """Round numbers of seconds worked, each with its place."""
        found = []
        for tick in time_ticks(self.total or 1.0, TICKS):
            before = [sum(e - b for b, e in self.sessions[: i + 1]) for i in range(len(self.sessions) - 1)]
            found.append((self.place(tick, sum(tick > b for b in before)), clock(tick)))
        return [mark for mark in found if all(abs(mark[0] - place) > BESIDE_PAUSE for place, _ in self.pauses())]

    def pauses(self) -> list[tuple[float, float]]:
        """Where each pause begins, and how many seconds it stands for."""
        gaps = pairwise(self.sessions)
        return [(self.at(one[1]), other[0] - one[1]) for one, other in gaps]


def timeline(account: Account) -> Markup:
    """The table of rows and bars, and what is in none."""
    axis = Axis(account.sessions)
    rows = sorted((s for s in account.steps.values() if s.attempts), key=lambda s: s.attempts[0].began)
    said = [
        _those("Reused without running", [s for s in account.steps.values() if s.state == "reused" and not s.attempts]),
        _those("Not run", [s for s in account.steps.values() if s.state == "skipped" and not s.attempts]),
        _those("Waiting", [s for s in account.steps.values() if s.state == "waiting" and not s.attempts]),
    ]
    if not rows:
        return joined(element("p", "No step had to run.", class_="note"), said)
    marks = axis.marks()
    ruler = [element("span", text, style=f"left:{place:.2f}%") for place, text in marks]
    ruler += [
        element("span", f"+{took(gap)}", class_="pause", style=f"left:{place + PAUSE / 2:.2f}%")
        for place, gap in axis.pauses()
    ]
    lines = [element("i", class_="tick", style=f"left:{place:.2f}%") for place, _ in marks]
    lines += [element("i", class_="gap", style=f"left:{p:.2f}%;width:{PAUSE}%") for p, _ in axis.pauses()]
    head = element(
        "tr",
        element("th", "step", scope="col"),
        element("th", element("div", ruler, class_="ruler"), scope="col", aria_label="when it ran"),
        element("th", "took", scope="col", class_="number"),
    )
    body = [_row(s, axis, account.sessions[0][0], lines) for s in rows]
    return joined(
        element(
            "div", element("table", element("thead", head), element("tbody", body), class_="timeline"), class_="card"
        ),
        said,
    )


def _row(step: Step, axis: Axis, zero: float, lines: Sequence[Markup]) -> Markup:
    bars = [_bar(a, axis, zero, len(step.attempts)) for a in step.attempts]
    tries = f" in attempt {step.attempts[-1].number}" if len(step.attempts) > 1 else ""
    fact = took(step.seconds) if step.state == "done" else badge(step.state)
    told = "; ".join(_told(a, zero, len(step.attempts)) for a in step.attempts)
    return element(
        "tr",
        element("th", element("a", step.name, href=f"#step-{step.name}"), scope="row"),
        element("td", element("div", lines, bars, class_="track", role="img", aria_label=told)),
        element("td", fact, element("span", tries, class_="tries") if tries else None, class_="number"),
    )


def _bar(attempt: Attempt, axis: Axis, zero: float, attempts: int) -> Markup:
    left, right = axis.at(attempt.began), axis.at(attempt.ended)
    return element(
        "i",
        class_=f"bar {attempt.state}",
        style=f"left:{left:.2f}%;width:{right - left:.2f}%",
        title=_told(attempt, zero, attempts),
    )


def _told(attempt: Attempt, zero: float, attempts: int) -> str:
    which = f"attempt {attempt.number}: " if attempts > 1 else ""
    span = f"from +{took(attempt.began - zero)} to +{took(attempt.ended - zero)}"
    return f"{which}{word(attempt.state)}, {span}, {took(attempt.ended - attempt.began)}"


def _those(what: str, steps: Sequence[Step]) -> Markup | None:
    if not steps:
        return None
    links = [[", " if i else "", element("a", s.name, href=f"#step-{s.name}")] for i, s in enumerate(steps)]
    return element("p", f"{what}: ", links, ".", class_="note names")
