"""Command line -> Plan, and a plan as plain values."""

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.capacity import Capacity, here
from cluster.connect import NoCluster, cluster
from cluster.profile import Profile
from lfm.errors import UnknownName
from operators.artifact import kind_of
from operators.catalog import Catalog
from operators.engines.ports import LAST_PORT, PortBusy, check_port
from pipelines.execute import memory_of
from pipelines.files import opened
from pipelines.inputs.inspector import Looks
from pipelines.limits import Limits, senseless
from pipelines.lineage import Event
from pipelines.plan import Plan, PlanError, needed, pinned, survey
from pipelines.problems import Problem, unknown_step
from pipelines.profiles import unreadable
from pipelines.schedule import infeasible
from pipelines.spec import RESOURCES, Draft, StepSpec
from pipelines.storage.base import Storage, StorageFailed, UnsupportedStorage, cache
from pipelines.storage.opening import open_storage
from pipelines.store import Store

HASHING_BYTES = 100 << 20  # files above this are named while they are hashed, which takes a while


def read_plan(
    arguments: Namespace, *, forced: tuple[str, ...] = (), profile: Profile | None = None
) -> tuple[Plan, Storage]:
    """Read and plan a pipeline, and open the store that it needs.

    Args:
        arguments: Of the command line.
        forced: Steps that are to run although they are stored.
        profile: Where it is to run; nothing is asked whether that is up.

    Raises:
        PlanError: With every problem of text, inputs, resources, store and cluster.
    """
    pipeline = opened(arguments.pipeline, changes=arguments.changes)
    draft, until = pipeline.draft, arguments.until
    problems = list(draft.problems)
    problems += [unknown_step("--force", n, draft.names) for n in forced if n not in draft.names]
    if until and until not in draft.names:
        problems.append(unknown_step("--until", until, draft.names))
    storage = there = None
    store = profile.storage if profile is not None else arguments.store
    try:
        storage = open_storage(store) if store else None
    except (StorageFailed, UnsupportedStorage) as error:
        problems.append(Problem(("--store",), str(error)))
    if profile is not None:
        there = profile.capacity()
        problems += senseless(Limits.of(arguments), profile)
        problems += _unreadable(profile, arguments.mlflow or profile.mlflow, draft)
    else:
        try:
            there = capacity_at(arguments.address)
        except NoCluster as error:
            problems.append(Problem(("--address",), str(error)))
    inspector = inspector_of(storage, hashed=not getattr(arguments, "no_hash", False))
    until = until if until in draft.spec.steps else ""
    own = profile is None and arguments.address == "local"
    problems += found_in(draft, there, pipeline.catalog, inspector, own=own, until=until)
    if problems or storage is None:
        raise PlanError(draft.places.sentences(problems))
    return pinned(draft.spec, inspector, pipeline.catalog, until=until), storage


def _unreadable(profile: Profile, mlflow: str, draft: Draft) -> list[Problem]:
    """What the profile's machines could not read; of what the pipeline does not say, the profile has to be changed."""
    paths = {n: str(Path(a.uri).expanduser().absolute()) for n, a in draft.spec.inputs.items() if "://" not in a.uri}
    inputs = {n: replace(a, uri=paths.get(n, a.uri)) for n, a in draft.spec.inputs.items()}
    found = unreadable(profile, store=profile.storage, mlflow=mlflow, inputs=inputs)
    return [p if p.path[0] == "inputs" else Problem(("--cluster",), p.sentence) for p in found]


def found_in(
    draft: Draft, there: Capacity | None, catalog: Catalog, inspector: Looks, *, own: bool, until: str = ""
) -> list[Problem]:
    """Everything that keeps a pipeline from running on `there`, beside what its text tells.

    Args:
        draft: The pipeline.
        there: What it will run on; None where that is not known.
        catalog: The operators that it names.
        inspector: Looks at what comes from outside.
        own: Whether `there` is a Ray of this machine's that the run starts itself.
        until: The only step that is wanted, with what it needs; empty wants all.
    """
    problems = survey(draft.spec, inspector, catalog, until=until, besides=draft.taken)
    wanted = needed(draft.spec, until) | ({*draft.asks} - draft.spec.steps.keys())
    if there is not None:
        problems += infeasible({n: asks for n, asks in draft.asks.items() if n in wanted}, there)
    return [*problems, *_endpoints({n: s for n, s in draft.spec.steps.items() if n in wanted}, own=own)]


def _endpoints(steps: Mapping[str, StepSpec], *, own: bool) -> list[Problem]:
    """A second endpoint, which one Ray cannot have, and with `own` a port that nobody can listen on."""
    asked = [(n, s.params) for n, s in steps.items() if s.operator == "serve" and {"host", "port"} <= s.params.keys()]
    problems = []
    for name, _ in asked[1:]:
        sentence = (
            f"a second endpoint beside {asked[0][0]!r}, expected one in a pipeline. Serve it in a run of its own."
        )
        problems.append(Problem(("steps", name), sentence))
    if asked and own:
        name, params = asked[0]
        host, port = str(params["host"]), int(str(params["port"]))
        try:
            if 1 <= port <= LAST_PORT:  # `serve` itself refuses others
                check_port("endpoint", host, port)
        except PortBusy as busy:
            problems.append(Problem(("steps", name, "params", "port"), str(busy)))
    return problems


def inspector_of(storage: Storage | None, *, hashed: bool = True) -> Looks:
    """What looks at a pipeline's inputs; names on standard error what takes long to hash.

    Without a store it does not look at what would be there, and can pin nothing.
    """

    def say(path: str, size: int) -> None:
        if size > HASHING_BYTES:
            print(f"hashing {path}, {size / 1e9:.1f} GB", file=sys.stderr)

    if storage is None:
        return Looks(cache() / "inputs.sqlite", store=None, hash=False)
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
        "unhashed": list(step.unhashed),
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
