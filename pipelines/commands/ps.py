"""`lfm ps`: list runs."""

import time
from argparse import Namespace
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich.table import Table

from pipelines.commands._output import printed, shown
from pipelines.commands._stored import storage_in
from pipelines.lineage import StepState, by_driver, history, runs, states, status, worked
from pipelines.usage import usage
from pipelines.view import heard, seconds


def act(arguments: Namespace) -> int:
    """List runs."""
    storage = storage_in(arguments)
    found: list[dict[str, Any]] = []
    for name in runs(storage):
        events = heard(storage, history(storage, name))
        said = status(storage, name, events)
        now = states(events, events[0].data["steps"])
        began = by_driver(events)[-1][0].data
        until = time.time() if said == "running" else 0.0
        spent = usage(events, now=until)  # what each step had of it makes no difference to the sum
        finished = sum(s.state in ("done", "reused") for s in now.values())
        found.append(
            {
                "run": name,
                "status": said,
                "began": events[0].time,
                "ended": events[-1].time,
                "seconds": worked(events, until),
                "steps": len(now),
                "finished": finished,
                "waits": _waits(now) if said == "running" else {},
                "priority": began.get("priority", 0),
                "labels": began.get("labels", {}),
                "cost": None if spent is None else spent.whole.cost,
                "currency": "" if spent is None else spent.currency,
            }
        )
    if arguments.json:
        return printed(found)
    rows = Table("run", "status", "began", "took", "steps", box=None, pad_edge=False, header_style="bold")
    if any(one["cost"] is not None for one in found):
        rows.add_column("cost", justify="right")
    for one in found:
        when = f"{datetime.fromtimestamp(one['began']):%Y-%m-%d %H:%M}"
        took = seconds(one["seconds"])
        cost = "" if one["cost"] is None else f"{one['cost']:.2f} {one['currency']}"
        why = "".join(f"; {step} waits, {said}" for step, said in list(one["waits"].items())[:1])
        cells = (one["run"], one["status"], when, took, f"{one['finished']}/{one['steps']}{why}", cost)
        rows.add_row(*cells[: len(rows.columns)])
    shown(rows)
    return 0


def _waits(now: Mapping[str, StepState]) -> dict[str, str]:
    """What the steps wait for that wait for something else than steps of their own run."""
    return {step: str(s.data["why"]) for step, s in now.items() if s.state == "waiting" and "why" in s.data}
