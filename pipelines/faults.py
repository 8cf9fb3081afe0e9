"""Points at which a process may die: between two of them something has happened or has not, and never half.

Tests kill at each. A process that is started with ``LFM_FAULTS=FILE`` in its environment dies at the point that the
file names, if it gets there, once: the file goes first. Without that variable nothing is looked at.
"""

import os
import signal
from pathlib import Path

EVENTS = ("started", "nodes", "serving", "finished", "wait", "start", "workers", "reuse", "commit", "fail")
POINTS = (
    # The driver: around everything that it writes down.
    "claim: decided",
    "claim: written",
    *(f"journal: {when} {event}" for event in EVENTS for when in ("before", "after")),
    "pack: before it",
    "pack: is in",
    "driver: Ray is open",
    "lease: taken",
    "lease: before it is given back",
    "lease: given back",
    "driver: a step was handed to Ray",
    "driver: a step has answered",
    # The step's process: around its body and inside of its commit.
    "step: began",
    "step: inputs are here",
    "step: body is done",
    "put: files are hashed",
    "put: manifest is written",
    "put: artifact is in",
    "commit: before the result",
    "commit: result is in",
    "step: checkpoints are gone",
    "keep: checkpoint is in",
    "register: before the version",
    "register: version is in",
    "register: alias has moved",
    # A folder as storage: around what cannot be done twice.
    "adopt: files are on disk",
    "adopt: folder is in",
    "write: bytes are on disk",
    "write: key is there",
    "replace: key is replaced",
)
"""Every point of a run by its name."""

DELIVERY_POINTS = (
    "tell: experiment is made",
    "tell: run is made",
    "tell: parameters and tags are in",
    "tell: model is made",
    "tell: model is ready",
    "tell: inputs are in",
    "tell: points are in",
    "tell: outputs are in",
    "tell: run has its state",
    "tell: name is made",
    "tell: version is made",
    "tell: alias has moved",
    "tell: all is told",
    "tell: entry is gone",
)
"""Those of a process that tells MLflow: after each of MLflow's answers, before anything is made of it."""

_FILE = os.environ.get("LFM_FAULTS", "")


def reached(point: str) -> None:
    """Die here, if somebody wants to see what happens then."""
    if not _FILE:
        return
    assert point in POINTS or point in DELIVERY_POINTS, point
    file = Path(_FILE)
    try:
        wanted = file.read_text() == point
        if wanted:
            file.unlink()
    except FileNotFoundError:
        return
    if wanted:
        os.kill(os.getpid(), signal.SIGKILL)
