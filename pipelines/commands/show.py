"""`lfm show`: show a run."""

import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from pipelines.commands._output import printed, shown
from pipelines.findings import comparisons, endpoints, measured_table, measurements
from pipelines.lineage import find_run, history, states, status
from pipelines.page.account import account
from pipelines.page.document import document, write
from pipelines.storage.opening import open_storage
from pipelines.store import Store
from pipelines.view import failure, row, seconds, table


def act(arguments: Namespace) -> int:
    """Show a run."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    began = events[0].data
    now = states(events, began["steps"])
    said = status(storage, name, events)
    if arguments.html:
        write(Path(arguments.html), document(account(Store(storage), name, now=time.time())))
        print(f"run {name}: {said}; see {arguments.html}", file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        steps = {n: {**began["steps"][n], **asdict(s)} for n, s in now.items()}
        return printed({"run": name, "status": said, "began": events[0].time, "ended": events[-1].time,
                       "inputs": began["inputs"], "steps": steps})  # fmt: skip
    if arguments.html:
        return 0
    print(f"run {name}: {said}, {seconds(events[-1].time - events[0].time)}")
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
