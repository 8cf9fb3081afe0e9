"""`lfm logs`: print what a step printed, or the driver of a run on a cluster."""

import sys
from argparse import Namespace
from collections.abc import Sequence

from pipelines.commands._planned import known_step
from pipelines.commands._stored import storage_in
from pipelines.lineage import Event, find_run, history
from pipelines.storage.base import Storage


def act(arguments: Namespace) -> int:
    """Print what a step printed, or the driver."""
    storage = storage_in(arguments)
    name = find_run(storage, arguments.run)
    if not arguments.step:
        return _of_driver(storage, name, arguments.attempt)
    return _of_step(storage, name, history(storage, name), arguments.step, arguments.attempt)


def _of_step(storage: Storage, run: str, events: Sequence[Event], step: str, attempt: int) -> int:
    known_step(step, list(events))
    starts = [e.data for e in events if e.kind == "start" and e.step == step]
    wanted = [d for d in starts if d["attempt"] == attempt] if attempt else starts[-1:]
    if not wanted:
        print(f"step {step!r} of {run} has no such attempt: it was started {len(starts)} times here.")
        return 1
    return _printed(storage, wanted[0]["log"])


def _of_driver(storage: Storage, run: str, attempt: int) -> int:
    keys = storage.list(f"runs/{run}/driver")
    wanted = [k for k in keys if k.endswith(f"/{attempt:06}.log")] if attempt else keys[-1:]
    if not wanted:
        numbers = ", ".join(k.rpartition("/")[2].removesuffix(".log").lstrip("0") for k in keys) or "none"
        print(f"run {run} has no such log of a driver, only those numbered {numbers}. Name a step for its log.")
        return 1
    return _printed(storage, wanted[0])


def _printed(storage: Storage, key: str) -> int:
    sys.stdout.write((storage.read(key) or b"").decode(errors="replace"))
    return 0
