"""`lfm stop`: end a run."""

import os
import signal
from argparse import Namespace

import psutil

from pipelines.lineage import driver, find_run
from pipelines.storage import open_storage


def act(arguments: Namespace) -> int:
    """End a run: its driver gets SIGTERM, writes down that it was interrupted, and takes its cluster with it."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    pid = driver(storage, name)
    if pid is None:
        print(f"run {name} is not going on")
        return 0
    os.kill(pid, signal.SIGTERM)
    try:
        psutil.Process(pid).wait(timeout=60)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        print(f"run {name}: process {pid} has not ended after 60 s, expected it to. End it with kill -9 {pid}.")
        return 1
    print(f"run {name} stopped")
    return 0
