"""Events -> what the terminal shows: a live table, or plain lines where nobody watches."""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from heapq import nsmallest
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from pipelines.lineage import Event, Standing, StepState, by_driver
from pipelines.plan import Plan
from pipelines.storage.base import Storage, at_once

DRAWN_S = 0.25  # how old a live table may be
BESIDE = 4  # lines of a terminal that a live table leaves for what is printed above and below it


class Lines:
    """One line for each event."""

    def __init__(self, plan: Plan, storage: Storage, out: TextIO | None = None) -> None:
        self.plan, self.storage, self.out = plan, storage, out

    def __call__(self, events: Sequence[Event]) -> None:
        """Print the events."""
        for event in events:
            line = f"{datetime.fromtimestamp(event.time):%H:%M:%S} {sentence(event, self.storage)}"
            print(line, file=self.out, flush=True)

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *ended: object) -> None:
        pass


class LiveTable:
    """The steps that say most, as many as the terminal is high, with how far those are that run."""

    def __init__(self, plan: Plan, storage: Storage, console: Console | None = None) -> None:
        self.plan, self.storage = plan, storage
        self.standing = Standing(plan.steps)
        self.live = Live(console=console or Console(), refresh_per_second=1 / DRAWN_S)
        self.due = 0.0

    def __call__(self, events: Sequence[Event]) -> None:
        """Take the events in, and draw the table again where it is old."""
        for event in events:
            self.standing.add(event)
            if event.kind in ("started", "serving"):
                self.live.console.print(sentence(event, self.storage), soft_wrap=True, highlight=False)
        if time.monotonic() >= self.due:
            self._draw()

    def _draw(self) -> None:
        most = max(1, self.live.console.height - BESIDE)
        self.live.update(drawn(self.standing.steps, self.storage, time.time(), most))
        self.due = time.monotonic() + DRAWN_S

    def __enter__(self) -> "LiveTable":
        self.live.__enter__()
        return self

    def __exit__(self, *ended: Any) -> None:
        if ended[0] is None:
            self._draw()
        self.live.__exit__(*ended)


def view(plan: Plan, storage: Storage, *, json_follows: bool = False) -> Lines | LiveTable:
    """What fits where standard output goes; lines go to standard error where it is for JSON."""
    if json_follows:
        return Lines(plan, storage, sys.stderr)
    return LiveTable(plan, storage) if sys.stdout.isatty() else Lines(plan, storage)


def sentence(event: Event, storage: Storage) -> str:
    """What happened, in one line."""
    data = event.data
    match event.kind:
        case "started":
            return "\n".join((f"run {data['run']} of {len(data['steps'])} steps", *without_fingerprint(data["steps"])))
        case "serving":
            urls = ", ".join(f"{e['name']} at {e['url']}" for e in data["endpoints"])
            return f"serving {urls}; Ctrl-C or lfm stop ends it"
        case "finished":
            return f"run {data['status']}{f': {why}' if (why := data.get('why')) else ''}"
        case "nodes":
            counts = ", ".join(f"{count} of {group}" for group, count in data["nodes"].items())
            return f"machines besides the head: {counts or 'none'}"
        case "wait":
            return f"{event.step}: waits, {data['why']}"
        case "start":
            again = f", attempt {data['attempt']}" if data["attempt"] > 1 else ""
            with_less = ", ".join(f"{k}={v}" for k, v in data.get("eased", {}).items())
            return f"{event.step}: started{again}{f' with {with_less}' if with_less else ''}"
        case "workers":
            return f"{event.step}: {data['workers']} worker{'s'[: data['workers'] > 1]} from now on, {data['why']}"
        case "reuse":
            return f"{event.step}: reused, {data['artifact']} digest {data['digest'][:12]}"
        case "commit":
            made = f"{data['artifact']} digest {data['digest'][:12]}"
            return f"{event.step}: done in {seconds(data['seconds'])}, {made}{_unwritten(data)}"
        case _:
            return failure(event.step, data, storage)


def without_fingerprint(steps: Mapping[str, Any]) -> list[str]:
    """A sentence for each step that something keeps from having a fingerprint, of steps as a journal has them."""
    return [
        f"step {name}: never reused, for it has no fingerprint: {', '.join(step['unhashed'])}"
        for name, step in steps.items()
        if step.get("unhashed")
    ]


def failure(step: str, data: Mapping[str, Any], storage: Storage) -> str:
    """The house sentence about a failed attempt."""
    said, log = data["sentence"].rstrip("."), f"{storage.uri}/{data['log']}"
    if not data["log"]:  # it never had a process
        return f"Step {step!r} was given up: it {said}."
    return (
        f"Step {step!r} failed in attempt {data['attempt']} with {data['error']}: {said}. Log: {log}{_unwritten(data)}"
    )


def _unwritten(data: Mapping[str, Any]) -> str:
    """Why some of what an attempt printed or measured is lost, where that is so."""
    return f"; not all of its log and measures is there, {data['unwritten']}" if "unwritten" in data else ""


def drawn(now: Mapping[str, StepState], storage: Storage, moment: float, most: int) -> Group:
    """The steps that say most as a table, in their order, and below it how many there are of each state, if more.

    Args:
        now: The states of all steps.
        storage: Where what they report is.
        moment: The time.
        most: So many rows; each takes longer to draw than a step to be decided.
    """
    chosen = {*nsmallest(most, now, key=lambda n: SAYS[now[n].state] + (now[n].state == "waiting" and not now[n].data))}
    shown = [n for n in now if n in chosen]
    rows = table({n: row(n, now[n], storage, moment) for n in shown})
    if len(shown) == len(now):
        return Group(rows)
    counts = Counter(s.state for s in now.values())
    each = ", ".join(f"{counts[state]} {state}" for state in STYLES if counts[state])
    return Group(rows, f"{len(shown)} of {len(now)} steps: {each}")


def table(rows: Mapping[str, tuple[str, ...]]) -> Table:
    """Steps as rows."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "state", "progress", "rate", "left", "took", "result"):
        made.add_column(column, justify="left" if column in ("step", "state", "result") else "right")
    for name, cells in rows.items():
        made.add_row(name, *cells)
    return made


SAYS = {"running": 0, "failed": 1, "interrupted": 1, "waiting": 2, "done": 4, "reused": 5}
"""What is shown first where not all steps can be; of those that wait, one that knows why."""
STYLES = {
    "running": "cyan",
    "done": "green",
    "reused": "green",
    "failed": "red",
    "interrupted": "yellow",
    "waiting": "dim",
}


def row(step: str, state: StepState, storage: Storage, now: float) -> tuple[str, ...]:
    """State, progress, rate, time left, time taken and result of one step."""
    style = STYLES[state.state]
    progress = rate = left = ""
    took = seconds(state.ended - state.began) if state.ended and state.state != "reused" else ""
    result = str(state.data.get("digest", ""))[:12]
    if state.state == "running":
        took = seconds(now - state.began)
        lines = measured(storage, state.data.get("log", ""))
        if lines:
            first, last = lines[0], lines[-1]
            progress = f"{last['done']}/{last['total']}"
            elapsed = last["time"] - first["time"]
            if elapsed > 0 and last["done"] > first["done"]:
                pace = (last["done"] - first["done"]) / elapsed
                rate, left = f"{pace:.3g}/s", seconds((last["total"] - last["done"]) / pace)
            measures = {**last.get("measures", {}), **{k: state.data[k] for k in ("workers",) if k in state.data}}
            result = "  ".join(f"{k} {v:.4g}" for k, v in measures.items())
    if state.state == "waiting":
        result = escape(str(state.data.get("why", "")))
    if state.state == "failed":
        result = escape(str(state.data.get("sentence", "")))
    return f"[{style}]{state.state}[/]", progress, rate, left, took, result


def measured(storage: Storage, log: str) -> list[dict[str, Any]]:
    """What an attempt reported, by the key of its log."""
    data = storage.read(log.replace("/logs/", "/measures/").removesuffix(".log") + ".jsonl")
    return [json.loads(line) for line in (data or b"").splitlines() if line.endswith(b"}")]


def heard(storage: Storage, events: Sequence[Event]) -> list[Event]:
    """A run's events, and for each driver that did not write down its end when its steps reported last.

    What a step reports has the clock of the machine that it runs on, so nothing is heard after the next claim.
    """
    drivers = by_driver(events)
    found: list[Event] = []
    for own, following in zip(drivers, [*drivers[1:], []], strict=True):
        reports = at_once(partial(measured, storage), _open(own))
        last = max((lines[-1]["time"] for lines in reports if lines), default=0.0)
        last = min([last, *(e.time for e in following[:1])])
        found += [*own, Event("heard", time=last)] if last > own[-1].time else own
    return found


def _open(own: Sequence[Event]) -> list[str]:
    """The logs of the attempts of which one driver's events tell no end."""
    logs: dict[str, str] = {}
    for event in own:
        if event.kind == "finished":  # ends whatever still runs
            logs.clear()
        elif event.kind == "start":
            logs[event.step] = event.data["log"]
        elif event.kind != "workers":
            logs.pop(event.step, None)
    return list(logs.values())


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
