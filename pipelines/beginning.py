"""Plan -> what a run's journal says first: all that it takes to go on with the run, and to show it."""

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from operators.artifact import kind_of
from pipelines.lineage import Event
from pipelines.plan import Plan
from pipelines.spec import RESOURCES, dump


def started(made: Plan, run: str, *, retries: int, mlflow: str, forced: Sequence[str] = (), **others: Any) -> Event:
    """The event of a driver that begins.

    Args:
        made: What it runs.
        run: The run.
        retries: How often a step may fail.
        mlflow: Where the run is told.
        forced: Steps that run although their result is stored.
        others: What else is noted.
    """
    data = {
        "run": run,
        "spec": dump(replace(made.spec, inputs={**made.spec.inputs, **made.inputs})),
        "uses": list(made.spec.code.uses),
        "files": [list(f) for f in made.spec.code.files],
        "retries": retries,
        "forced": list(forced),
        "mlflow": mlflow,
        "inputs": inputs_of(made),
        "steps": {n: described(made, n) for n in made.steps},
        "version": version("learn-from-model"),
        **others,
    }
    return Event("started", data=data, time=time.time())


def described(made: Plan, name: str) -> dict[str, Any]:
    """A planned step as JSON."""
    step = made.steps[name]
    return {
        "operator": step.operator,
        "method": step.method and {"name": step.method[0], **step.method[1]},
        "params": dict(step.params),
        "inputs": {k: list(r) if isinstance(r, tuple) else r for k, r in step.inputs.items()},
        "resources": RESOURCES.dump_python(step.resources),
        "kind": step.kind,
        "effect": step.effect,
        "needs": list(step.needs),
        "fingerprint": step.fingerprint,
        "unhashed": list(step.unhashed),
        "components": dict(step.components),
    }


def inputs_of(made: Plan) -> dict[str, dict[str, str]]:
    """A plan's inputs as JSON."""
    return {k: {"kind": kind_of(type(a)), "uri": a.uri, "digest": a.digest} for k, a in made.inputs.items()}
