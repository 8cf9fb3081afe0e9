"""`lfm logs`: print what a step printed."""

import sys
from argparse import Namespace

from pipelines.commands._planned import known_step
from pipelines.lineage import find_run, history
from pipelines.storage.opening import open_storage


def act(arguments: Namespace) -> int:
    """Print what a step printed."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    known_step(arguments.step, events)
    starts = [e.data for e in events if e.kind == "start" and e.step == arguments.step]
    wanted = [d for d in starts if d["attempt"] == arguments.attempt] if arguments.attempt else starts[-1:]
    if not wanted:
        print(f"step {arguments.step!r} of {name} has no such attempt: it was started {len(starts)} times here.")
        return 1
    sys.stdout.write((storage.read(wanted[0]["log"]) or b"").decode(errors="replace"))
    return 0
