"""Command line -> Plan, and a plan as plain values."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from cluster.capacity import Capacity, here
from cluster.connect import cluster
from lfm.errors import UnknownName
from operators.artifact import kind_of
from operators.catalog import Catalog
from pipelines.execute import memory_of
from pipelines.files import opened
from pipelines.inspector import Looks
from pipelines.lineage import Event
from pipelines.plan import Plan, PlanError, plan as planned, survey
from pipelines.schedule import infeasible
from pipelines.spec import RESOURCES, Spec
from pipelines.storage import Storage
from pipelines.store import Store

HASHING_BYTES = 100 << 20  # files above this are named while they are hashed, which takes a while


def read_plan(arguments: Namespace, storage: Storage, *, there: Capacity, forced: tuple[str, ...] = ()) -> Plan:
    """Read and plan a pipeline; every problem of text, inputs and resources is reported at once."""
    pipeline = opened(arguments.pipeline, changes=arguments.changes)
    problems = list(pipeline.problems)
    problems += [f"--force: no step is called {n!r}." for n in forced if n not in pipeline.spec.steps]
    inspector = inspector_of(storage, hashed=not getattr(arguments, "no_hash", False))
    own = arguments.address == "local"
    return plan_on(there, pipeline.spec, pipeline.catalog, inspector, own=own, until=arguments.until, problems=problems)


def plan_on(
    there: Capacity,
    spec: Spec,
    catalog: Catalog,
    inspector: Looks,
    *,
    own: bool,
    until: str = "",
    problems: Sequence[str] = (),
) -> Plan:
    """Plan what will run on `there`; with `own` that is a Ray of this machine's that the run starts itself.

    Raises:
        PlanError: With `problems` and all others.
    """
    found = [*problems, *survey(spec, inspector, catalog, until=until)]
    found += infeasible({n: s.resources for n, s in spec.steps.items()}, there)
    found += _taken_ports(spec) if own else []
    if found:
        raise PlanError(tuple(found))
    return planned(spec, inspector, catalog, until=until)


def _taken_ports(spec: Spec) -> list[str]:
    asked = {
        n: (str(s.params["host"]), int(str(s.params["port"]))) for n, s in spec.steps.items() if s.operator == "serve"
    }
    if not asked:
        return []
    from operators.serving import PortBusy, busy  # with torch, which not every pipeline needs

    return [f"step {n!r}: {PortBusy(*where)}" for n, where in asked.items() if busy(*where)]


def inspector_of(storage: Storage, *, hashed: bool = True) -> Looks:
    """What looks at a pipeline's inputs; names on standard error what takes long to hash."""

    def say(path: str, size: int) -> None:
        if size > HASHING_BYTES:
            print(f"hashing {path}, {size / 1e9:.1f} GB", file=sys.stderr)

    return Looks(memory_of(storage), store=Store(storage), hash=hashed, hashing=say)


def capacity_at(address: str) -> Capacity:
    """What the cluster at `address` has in all; ``local`` is this machine."""
    if address == "local":
        return here()
    with cluster(address) as there:
        return there


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
        "components": dict(step.components),
    }


def inputs_of(made: Plan) -> dict[str, dict[str, str]]:
    """A plan's inputs as JSON."""
    return {k: {"kind": kind_of(type(a)), "uri": a.uri, "digest": a.digest} for k, a in made.inputs.items()}


def known_step(step: str, events: list[Event]) -> None:
    """Raise `UnknownName` unless the run has the step."""
    known = tuple(events[0].data["steps"])
    if step not in known:
        raise UnknownName("step", step, known)
