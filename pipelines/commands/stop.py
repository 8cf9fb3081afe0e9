"""`lfm stop`: end a run and its endpoints."""

import os
import signal
from argparse import Namespace
from typing import Any

import psutil

from cluster.connect import cluster
from operators.serving import take_down
from pipelines.findings import endpoints
from pipelines.lineage import Event, driver, find_run, history, states
from pipelines.storage.opening import open_storage


def act(arguments: Namespace) -> int:
    """End a run: its driver gets SIGTERM, writes down how it ended, and takes its cluster with it."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    pid = driver(storage, name)
    if pid is not None and not _ended(name, pid):
        return 1
    left = _left_up(events)
    if left:
        with cluster(events[0].data["address"]):
            for endpoint in left:
                take_down(endpoint["name"], endpoint["model"])
    if pid is None and not left:
        print(f"run {name} is not going on")
    else:
        print(f"run {name} stopped")
    return 0


def _ended(name: str, pid: int) -> bool:
    """Whether the run's driver has ended after it was told to."""
    try:
        os.kill(pid, signal.SIGTERM)
        psutil.Process(pid).wait(timeout=60)
    except (ProcessLookupError, psutil.NoSuchProcess):
        pass
    except psutil.TimeoutExpired:
        print(f"run {name}: process {pid} has not ended after 60 s, expected it to. End it with kill -9 {pid}.")
        return False
    return True


def _left_up(events: list[Event]) -> list[Any]:
    """The endpoints on a cluster that was there before the run; those on a Ray of its own ended with it."""
    if events[0].data["address"] == "local":
        return []
    return list(endpoints(states(events, events[0].data["steps"])))
