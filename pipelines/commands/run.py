"""`lfm run`: run a pipeline."""

import time
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version

from cluster.capacity import here
from cluster.connect import cluster
from pipelines.commands._output import printed
from pipelines.commands._planned import capacity_at, described, inputs_of, read_plan
from pipelines.lineage import Event, Journal, history, new_run, states
from pipelines.plan import Plan
from pipelines.run import run as drive
from pipelines.spec import dump
from pipelines.storage import Storage, open_storage
from pipelines.store import Store
from pipelines.view import view


def act(arguments: Namespace) -> int:
    """Run a pipeline."""
    storage = open_storage(arguments.store)
    there = capacity_at(arguments.address) if arguments.address != "local" else here()
    made = read_plan(arguments, storage, there=there, forced=tuple(arguments.force))
    journal = Journal.claim(storage, new_run(made.spec.name))
    return drive_to_end(made, storage, journal, arguments, forced=tuple(arguments.force), retries=arguments.retries)


def drive_to_end(
    made: Plan,
    storage: Storage,
    journal: Journal,
    arguments: Namespace,
    *,
    forced: tuple[str, ...],
    retries: int,
) -> int:
    """Drive a plan under a claimed journal, show it, and return the exit code."""
    until = getattr(arguments, "until", "")
    data = {
        "run": journal.run,
        "spec": dump(replace(made.spec, inputs={**made.spec.inputs, **made.inputs})),
        "uses": list(made.spec.code.uses),
        "files": [list(f) for f in made.spec.code.files],
        "until": until,
        "retries": retries,
        "inputs": inputs_of(made),
        "steps": {n: described(made, n) for n in made.steps},
        "version": version("learn-from-model"),
    }
    started = Event("started", data=data, time=time.time())
    journal.write([started])
    with view(made, storage) as watch:
        watch([started])
        said = drive(
            made,
            Store(storage),
            journal,
            connect=partial(cluster, arguments.address),
            forced=forced,
            max_failures=retries,
            watch=watch,
        )
    if arguments.json:
        now = states(history(storage, journal.run), made.steps)
        printed({"run": journal.run, "status": said, "steps": {n: asdict(s) for n, s in now.items()}})
    return {"done": 0, "failed": 1, "interrupted": 130}[said]
