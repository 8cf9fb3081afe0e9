"""What a run took, and what its plan foresaw -> rows that the terminal and the page show, and JSON. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from cluster.profile import HEAD
from pipelines.usage import HOUR_S, Line, Usage

Span = Sequence[float]
"""From the least to the most."""
COLUMNS = ("machines", "node-hours", "foreseen")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What a step took, or the head, or machines on which no step was, or all of them.

    Attributes:
        what: The step, or which of these; `step` says whether it is one.
        groups: The node groups that it was on.
        hours: Of all machines.
        hours_foreseen: The same, before it ran; None where nobody knew.
        cost: In the run's currency; None where no machine has a price.
        cost_foreseen: The same, before it ran.
        least: Whether what was foreseen is without steps of which nobody knew how long they take.
    """

    what: str
    step: bool
    groups: tuple[str, ...]
    hours: float
    hours_foreseen: Span | None
    cost: float | None
    cost_foreseen: Span | None
    least: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """As a table has it after the first column; what nobody knows is empty."""
        known = (_text(self.hours), _range(self.hours_foreseen, self.least))
        priced = () if self.cost is None else (_text(self.cost), _range(self.cost_foreseen, self.least))
        return (", ".join(self.groups), *known, *priced)


def rows(steps: Sequence[str], used: Usage, foreseen: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each step that took something or was to, then for what idled, for the head, and for all.

    Args:
        steps: All of the run, in their order.
        used: What it took.
        foreseen: As `pipelines.usage.foreseen` has it.
    """
    each: Mapping[str, Mapping[str, Any]] = foreseen.get("steps", {})
    whole: Mapping[str, Any] = foreseen.get("total", {})
    for name in steps:
        said = each.get(name, {})
        if name in used.steps or said.get("group"):
            yield _row(name, used.of(name), _hours(said), said.get("cost"), step=True)
    least = bool(whole.get("unknown"))
    seconds: Span | None = whole.get("seconds")
    yield _row("idle", used.idle, None, whole.get("idle"), least=least)
    yield _row(HEAD, used.head, seconds and [s / HOUR_S for s in seconds], whole.get("head"), least=least)
    yield _row("all", used.whole, None, whole.get("cost"), least=least)


def _row(
    what: str, line: Line, hours: Span | None, cost: Span | None, *, step: bool = False, least: bool = False
) -> Row:
    there = tuple(sorted(g for g, spent in line.hours.items() if spent and g != HEAD))
    return Row(
        what=what,
        step=step,
        groups=() if what == "all" else there,
        hours=line.total,
        hours_foreseen=hours,
        cost=line.cost,
        cost_foreseen=cost,
        least=least,
    )


def _hours(said: Mapping[str, Any]) -> Span | None:
    """Hours of machines that a step was to take; on the head they are the head's."""
    if said.get("seconds") is None:
        return None
    nodes = 0 if said["group"] == HEAD else said["nodes"]
    return [s * nodes / HOUR_S for s in said["seconds"]]


def heads(used: Usage) -> tuple[str, ...]:
    """What stands above the cells of a row."""
    return COLUMNS if used.whole.cost is None else (*COLUMNS, used.currency, "foreseen")


def costs_table(steps: Sequence[str], used: Usage, foreseen: Mapping[str, Any]) -> Table:
    """The rows; the arguments are those of `rows`."""
    made = Table("what it took", box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(heads(used)):
        made.add_column(name, justify="right" if number else "left")
    for row in rows(steps, used, foreseen):
        made.add_row(row.what if row.step else f"[dim]{row.what}[/]", *row.cells)
    return made


def plain_line(line: Line) -> dict[str, Any]:
    """A line as JSON."""
    return {"hours": dict(line.hours), "cost": line.cost}


def plain_usage(used: Usage | None) -> dict[str, Any]:
    """What a run took besides its steps, and in all, as JSON; nothing where nobody knows."""
    if used is None:
        return {}
    parts = {"all": used.whole, "idle": used.idle, "head": used.head}
    return {"took": {**{n: plain_line(one) for n, one in parts.items()}, "currency": used.currency}}


def _text(value: float) -> str:
    return "< 0.01" if 0 < value < 0.005 else f"{value:.2f}"


def _range(of: Span | None, least: bool) -> str:
    if of is None:
        return ""
    low, high = map(_text, of)
    if least:
        return f"{low} or more"
    return low if low == high else f"{low} to {high}"
