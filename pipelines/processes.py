"""Which process did something, and whether it still lives."""

import functools
import os
import socket
from collections.abc import Mapping
from typing import Any

import psutil

LEASE_S = 60.0
"""For how long one of another machine may say nothing before it counts as dead; clocks are never compared."""
BEAT_S = LEASE_S / 4
"""How often one that holds something says that it lives."""


def this() -> dict[str, Any]:
    """This process as JSON: a number alone may come again, with the time of its birth it does not."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


def alive(process: Mapping[str, Any]) -> bool | None:
    """Whether it lives; None for one of another machine, of which nobody here can tell."""
    if process.get("host") != socket.gethostname():
        return None
    try:
        return bool(abs(psutil.Process(process["pid"]).create_time() - float(process["born"])) < 1.0)
    except (psutil.Error, KeyError):
        return False


@functools.cache
def _born(pid: int) -> float:
    """Asked once for each process: a fork has another number."""
    return float(psutil.Process(pid).create_time())
