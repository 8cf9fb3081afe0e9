"""`lfm show`: show a run."""

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipelines.commands._output import printed, shown
from pipelines.findings import comparisons, endpoints, measured_table, measurements
from pipelines.lineage import Event, StepState, find_run, history, interrupted, states, status, worked
from pipelines.page.account import account
from pipelines.page.document import document, write
from pipelines.storage.base import Storage
from pipelines.storage.opening import open_storage
from pipelines.store import Store
from pipelines.view import failure, measured, row, seconds, table


def act(arguments: Namespace) -> int:
    """Show a run."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    began = events[0].data
    said = status(storage, name, events)
    now = {n: _heard(s, storage, events, said) for n, s in states(events, began["steps"]).items()}
    if arguments.html:
        write(Path(arguments.html), document(account(Store(storage), name, now=time.time())))
        print(f"run {name}: {said}; see {arguments.html}", file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        steps = {n: {**began["steps"][n], **asdict(s)} for n, s in now.items()}
        return printed({"run": name, "status": said, "began": events[0].time, "ended": events[-1].time,
                       "seconds": worked(events), "inputs": began["inputs"], "steps": steps})  # fmt: skip
    if arguments.html:
        return 0
    print(f"run {name}: {said}, {seconds(worked(events, time.time() if said == 'running' else 0.0))}")
    shown(table({n: row(n, s, storage, time.time()) for n, s in now.items()}))
    for step, state in now.items():
        if state.state == "failed":
            print(failure(step, state.data, storage))
    found = measurements(now)
    if found:
        print()
        shown(measured_table(found))
    for one in comparisons(now):
        print(f"gate: {one['said']}")
    for one in endpoints(now):
        print(f"endpoint: {one['name']} at {one['url']}")
    return 0


def _heard(step: StepState, storage: Storage, events: Sequence[Event], said: str) -> StepState:
    """A step of which nobody says any more how far it is was interrupted when it last did."""
    if step.state != "running" or said == "running":
        return step
    lines = measured(storage, step.data["log"])
    return interrupted(step, max([events[-1].time, *(line["time"] for line in lines[-1:])]))
