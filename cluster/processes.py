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

MACHINE = 0xEFFFFFFC  # what Linux calls the space of process numbers that is no container's


def this() -> dict[str, Any]:
    """This process as JSON: a number alone may come again, with the time of its birth it does not."""
    return of(os.getpid())


def of(pid: int) -> dict[str, Any]:
    """A process of this machine as JSON."""
    return {"host": host(), "pid": pid, "born": _born(pid)}


def host() -> str:
    """This machine; containers of one may have its name each, and numbers of their own for their processes."""
    space = os.stat("/proc/self/ns/pid").st_ino
    return socket.gethostname() if space == MACHINE else f"{socket.gethostname()}.{space}"


def alive(process: Mapping[str, Any]) -> bool | None:
    """Whether it lives; None for one of another machine, of which nobody here can tell."""
    if process.get("host") != host():
        return None
    try:
        found = psutil.Process(process["pid"])
        # Who is dead keeps its number until somebody asks how it ended, which nobody may.
        same = abs(found.create_time() - float(process["born"])) < 1.0
        return bool(same and found.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, KeyError):
        return False


@functools.cache
def _born(pid: int) -> float:
    """Asked once for each process: a fork has another number."""
    return float(psutil.Process(pid).create_time())
