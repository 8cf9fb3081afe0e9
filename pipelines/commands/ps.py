"""`lfm ps`: list runs."""

import time
from argparse import Namespace
from datetime import datetime
from typing import Any

from rich.table import Table

from pipelines.commands._output import printed, shown
from pipelines.commands._stored import storage_in
from pipelines.lineage import by_driver, history, runs, states, status, worked
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
        finished = sum(s.state in ("done", "reused") for s in now.values())
        found.append(
            {
                "run": name,
                "status": said,
                "began": events[0].time,
                "ended": events[-1].time,
                "seconds": worked(events, time.time() if said == "running" else 0.0),
                "steps": len(now),
                "finished": finished,
                "priority": began.get("priority", 0),
                "labels": began.get("labels", {}),
            }
        )
    if arguments.json:
        return printed(found)
    rows = Table("run", "status", "began", "took", "steps", box=None, pad_edge=False, header_style="bold")
    for one in found:
        when = f"{datetime.fromtimestamp(one['began']):%Y-%m-%d %H:%M}"
        took = seconds(one["seconds"])
        rows.add_row(one["run"], one["status"], when, took, f"{one['finished']}/{one['steps']}")
    shown(rows)
    return 0
