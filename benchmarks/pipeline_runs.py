"""A pipeline run by `lfm run` with some changes -> what its evaluations measured."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from operators.artifact import Metrics
from operators.measures.measure import SUMMARY
from pipelines.__main__ import ROOT
from pipelines.lineage import history, new_run, states
from pipelines.storage.opening import open_storage
from pipelines.store import Store

REUSED = ("done", "reused")

Command = Callable[[Sequence[str], Path], int]
"""Does what `lfm` does with these words in a folder, and gives its exit code."""


def typed(words: Sequence[str], folder: Path) -> int:
    """`lfm` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "pipelines", *words], cwd=folder, env=environment)
    while process.returncode is None:
        with contextlib.suppress(KeyboardInterrupt):  # it is for lfm too, which ends what it has begun
            process.wait()
    return process.returncode


def measured(
    pipeline: str,
    store: str,
    changes: Sequence[str] = (),
    *,
    folder: Path = Path(),
    until: str = "",
    may_fail: Collection[str] = (),
    lfm: Command = typed,
) -> dict[str, Metrics]:
    """Run a pipeline; what the store has is reused.

    Args:
        pipeline: A file, or the name of a recipe.
        store: Where results are kept.
        changes: As `lfm run` takes them with ``--set``.
        folder: Where it runs: from there on paths of its inputs lead.
        until: Leave out what this step does not need.
        may_fail: Steps that may end as they like, such as gates.
        lfm: Runs it.

    Returns:
        Every evaluation by its step's name.

    Raises:
        SystemExit: A step is not done. What is done stays in the store, so that the next try goes on there.
    """
    storage = open_storage(store)
    run = new_run(Path(pipeline).stem)
    words = ["run", pipeline, "--store", storage.uri, "--mlflow", "none", "--as", run]
    words += ["--until", until] if until else []
    code = lfm([*words, *(word for change in changes for word in ("--set", change))], folder)
    if code == 130:
        raise SystemExit("Interrupted. What is done is kept: the same command goes on there.")
    events = history(storage, run) if storage.list(f"runs/{run}/claims") else []
    ended = states(events, events[0].data["steps"]) if events else {}
    lost = [name for name, step in ended.items() if step.state not in REUSED and name not in may_fail]
    if lost or not ended:
        raise SystemExit(f"{pipeline}: lfm run ended with {code}, not done: {', '.join(lost) or 'all'}.")
    kept = Store(storage)
    found = {name: kept.get(step.data["digest"]) for name, step in ended.items() if name not in may_fail}
    return {name: made for name, made in found.items() if isinstance(made, Metrics)}


def sets_of(metrics: Metrics) -> Mapping[str, Mapping[str, Any]]:
    """The means of an evaluation, by set and measure."""
    sets: Mapping[str, Mapping[str, Any]] = json.loads((metrics.path / SUMMARY).read_text())["sets"]
    return sets
