"""A pipeline run as `lfm run` does it, but on a Ray that is there already."""

import contextlib
import time
from pathlib import Path

from cluster.pool import Pool
from pipelines.beginning import started
from pipelines.files import opened
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Event, Journal, history, new_run
from pipelines.plan import plan
from pipelines.run import run
from pipelines.storage.opening import open_storage
from pipelines.store import Store


def driven(pipeline: Path, store: Path) -> tuple[float, list[Event]]:
    """Seconds of the run itself, without reading and planning, and what happened."""
    storage = open_storage(str(store))
    read = opened(str(pipeline))
    made = plan(read.spec, Looks(store / "inputs.sqlite", Store(storage)), read.catalog)
    journal = Journal.claim(storage, new_run(read.spec.name))
    journal.write([started(made, journal.run, retries=0, mlflow="none", address="local")])
    began = time.perf_counter()
    status = run(made, Store(storage), journal, connect=lambda: contextlib.nullcontext(Pool()))
    seconds = time.perf_counter() - began
    events = history(storage, journal.run)
    assert status == "done", events
    return seconds, events
