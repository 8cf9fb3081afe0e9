"""Command line -> Plan, and a plan as plain values."""

import sys
from argparse import Namespace
from collections.abc import Mapping

from cluster.capacity import Capacity, here
from cluster.connect import NoCluster, cluster
from lfm.errors import UnknownName
from operators.catalog import Catalog
from operators.engines.ports import LAST_PORT, PortBusy, check_port
from pipelines.execute import memory_of
from pipelines.files import opened
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Event
from pipelines.plan import Plan, PlanError, pinned, survey
from pipelines.problems import Problem, unknown_step
from pipelines.schedule import infeasible
from pipelines.spec import Draft, StepSpec, needed
from pipelines.storage.base import Storage, StorageFailed, UnsupportedStorage, cache
from pipelines.storage.opening import open_storage
from pipelines.store import Store

HASHING_BYTES = 100 << 20  # files above this are named while they are hashed, which takes a while


def read_plan(arguments: Namespace, *, forced: tuple[str, ...] = ()) -> tuple[Plan, Storage]:
    """Read and plan a pipeline, and open the store that it needs.

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
    try:
        storage = open_storage(arguments.store)
    except (StorageFailed, UnsupportedStorage) as error:
        problems.append(Problem(("--store",), str(error)))
    try:
        there = capacity_at(arguments.address)
    except NoCluster as error:
        problems.append(Problem(("--address",), str(error)))
    inspector = inspector_of(storage, hashed=not getattr(arguments, "no_hash", False))
    until = until if until in draft.spec.steps else ""
    problems += found_in(draft, there, pipeline.catalog, inspector, own=arguments.address == "local", until=until)
    if problems or storage is None:
        raise PlanError(draft.places.sentences(problems))
    return pinned(draft.spec, inspector, pipeline.catalog, until=until), storage


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


def known_step(step: str, events: list[Event]) -> None:
    """Raise `UnknownName` unless the run has the step."""
    known = tuple(events[0].data["steps"])
    if step not in known:
        raise UnknownName("step", step, known)
