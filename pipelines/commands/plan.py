"""`lfm plan`: say what a run would do."""

from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any

from rich.table import Table

from operators.resources import Resources
from pipelines.beginning import described, inputs_of
from pipelines.commands._output import printed, shown
from pipelines.commands._planned import read_plan
from pipelines.plan import PlannedStep
from pipelines.spec import names_in
from pipelines.store import Store
from pipelines.view import without_fingerprint


def act(arguments: Namespace) -> int:
    """Say what a run would do."""
    made, storage = read_plan(arguments)
    stored = Store(storage).hits(s.fingerprint for s in made.steps.values() if s.fingerprint)
    state = {n: _prospect(s, stored, hashed=not arguments.no_hash) for n, s in made.steps.items()}
    if arguments.json:
        steps = {n: {**described(made, n), "state": state[n]} for n in made.steps}
        return printed({"name": made.spec.name, "inputs": inputs_of(made), "steps": steps})
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "operator", "method", "takes", "makes", "asks", "state", "fingerprint"):
        rows.add_column(column)
    for name, step in made.steps.items():
        method = step.method[0] if step.method else ""
        takes = ", ".join(dict.fromkeys(_taken(step.inputs)))
        rows.add_row(name, step.operator, method, takes, step.kind, _asks(step.resources), state[name],
                     step.fingerprint[:12] or "none")  # fmt: skip
    shown(rows)
    for line in without_fingerprint({n: described(made, n) for n in made.steps}):
        print(line)
    for name, artifact in made.inputs.items():
        print(f"input {name}: {artifact.uri} digest {artifact.digest[:12] or 'unknown'}")
    return 0


def _prospect(step: PlannedStep, stored: Collection[str], *, hashed: bool) -> str:
    if step.effect:
        return "runs (effect)"
    if not step.fingerprint and not hashed:  # a run hashes its inputs
        return "unknown"
    return "stored" if step.fingerprint in stored else "runs"


def _asks(resources: Resources) -> str:
    workers = f"{resources.workers} x " if resources.workers > 1 else ""
    gpus = f", {resources.gpus_per_worker:g} {resources.accelerator}" if resources.gpus else ""
    shared = f", {resources.strategy}" if resources.strategy != "single" else ""
    return f"{workers}{resources.cpus_per_worker:g} CPU{gpus}{shared}"


def _taken(inputs: Mapping[str, Any]) -> list[str]:
    return [n for r in inputs.values() for n in names_in(r)]
