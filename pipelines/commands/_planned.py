"""Command line -> Plan, and a plan as plain values."""

import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.capacity import Capacity, here
from cluster.connect import NoCluster, cluster
from cluster.profile import Profile
from lfm.errors import UnknownName
from lfm.method import STRATEGIES, Strategy
from operators.catalog import Catalog
from operators.code import bring
from operators.engines.ports import LAST_PORT, PortBusy, check_port
from operators.resources import Resources
from pipelines.beginning import described, inputs_of
from pipelines.estimates import (
    Estimate,
    Room,
    Total,
    estimate,
    heavy,
    nodes_in,
    plain,
    rooms_at,
    rooms_of,
    settled,
    total,
)
from pipelines.execute import memory_of
from pipelines.files import opened
from pipelines.footprints import Footprints
from pipelines.history import shapes as shapes_of, taken
from pipelines.inputs.inspector import Looks
from pipelines.limits import Limits, senseless, unpriced
from pipelines.lineage import Event
from pipelines.plan import Plan, PlanError, PlannedStep, pinned, survey, trains
from pipelines.problems import Problem, unknown_step
from pipelines.profiles import unreadable
from pipelines.schedule import infeasible
from pipelines.searches import Repetition, repeated, repetition
from pipelines.spec import Draft, Spec, StepSpec, needed
from pipelines.storage.base import Storage, StorageFailed, UnsupportedStorage, cache
from pipelines.storage.opening import open_storage
from pipelines.store import Store
from pipelines.trial_estimates import TrialsEstimate, trials_estimate

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
        problems += _unreadable(profile, getattr(arguments, "mlflow", "") or profile.mlflow, draft)
    else:
        try:
            there = capacity_at(arguments.address)
        except NoCluster as error:
            problems.append(Problem(("--address",), str(error)))
    inspector = inspector_of(storage, hashed=not getattr(arguments, "no_hash", False))
    until = until if until in draft.spec.steps else ""
    rooms = rooms_of(profile) if profile is not None else [] if there is None else rooms_at(there)
    footprints = Footprints(draft.spec, inspector, pipeline.catalog)
    spec, unsettled = _settled(draft.spec, footprints, rooms, needed(draft.spec, until))
    draft = replace(draft, spec=spec, asks={**draft.asks, **{n: s.resources for n, s in spec.steps.items()}})
    own = profile is None and arguments.address == "local"
    wanted = needed(spec, until)
    problems += unpriced({n: s for n, s in spec.steps.items() if n in wanted}, profile)
    problems += [*unsettled, *found_in(draft, there, pipeline.catalog, inspector, own=own, until=until)]
    if profile is not None:
        said = {problem.path[1] for problem in unsettled}
        asked = {n: spec.steps[n].resources for n in spec.steps if n in wanted and n not in said}
        problems += heavy(asked, {n: footprints.of(n, asks) for n, asks in asked.items()}, rooms)
    if problems or storage is None:
        raise PlanError(draft.places.sentences(problems))
    return pinned(draft.spec, inspector, pipeline.catalog, until=until), storage


def _unreadable(profile: Profile, mlflow: str, draft: Draft) -> list[Problem]:
    """What the profile's machines could not read; of what the pipeline does not say, the profile has to be changed."""
    paths = {n: str(Path(a.uri).expanduser().absolute()) for n, a in draft.spec.inputs.items() if "://" not in a.uri}
    inputs = {n: replace(a, uri=paths.get(n, a.uri)) for n, a in draft.spec.inputs.items()}
    found = unreadable(profile, store=profile.storage, mlflow=mlflow, inputs=inputs)
    return [p if p.path[0] == "inputs" else Problem(("--cluster",), p.sentence) for p in found]


def _settled(
    spec: Spec, footprints: Footprints, rooms: Sequence[Room], wanted: Collection[str]
) -> tuple[Spec, list[Problem]]:
    """A pipeline with a strategy for every step that leaves it to the plan, and what is wrong where none fits."""

    def allowed(name: str) -> Sequence[Strategy]:
        step = spec.steps[name]
        if not trains(footprints.catalog.operator(step.operator)):
            return ("single",)
        return STRATEGIES if step.method is None else step.method.needs.strategies

    asked = {name: step.resources for name, step in spec.steps.items() if name in wanted}
    found, problems = settled(asked, footprints.of, rooms, allowed)
    steps = {n: replace(s, resources=found.get(n, s.resources)) for n, s in spec.steps.items()}
    return replace(spec, steps=steps), problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreseen:
    """What a plan will take on the machines of a profile: each step, all together, and the trials of searches."""

    steps: Mapping[str, Estimate]
    total: Total
    searches: Mapping[str, TrialsEstimate]
    profile: Profile

    @property
    def json(self) -> dict[str, Any]:
        """What a journal keeps of it."""
        said = {"cost": self.total.cost, "currency": self.profile.currency, "cluster": self.profile.name}
        return {"steps": {n: plain(one) for n, one in self.steps.items()}, "total": {**asdict(self.total), **said}}


def estimated(made: Plan, storage: Storage, profile: Profile, state: Mapping[str, str]) -> Foreseen:
    """What a plan will take.

    Args:
        made: The plan.
        storage: Where earlier runs are.
        profile: The machines.
        state: What a plan says of each step, ``stored`` of one whose result is there.
    """
    catalog = Catalog(bring(made.spec.code))
    footprints = Footprints(made.spec, inspector_of(storage), catalog)
    shapes = shapes_of({n: described(made, n) for n in made.steps}, inputs_of(made))
    earlier, rooms = taken(storage), rooms_of(profile)

    def one(name: str, state: str) -> Estimate:
        return estimate(state, made.steps[name].resources, footprints.of(name), rooms, earlier.get(shapes[name], ()))

    each = {n: one(n, state[n]) for n in made.steps}
    searches = {}
    for name, again in repetitions(made, state, profile.capacity, catalog).items():
        alone = {n: one(n, "runs") for n in made.steps if n in again.times}
        packed = {n: _packed(made.steps[n].resources, e, again.at_once, rooms) for n, e in alone.items()}
        searches[name] = trials_estimate(again, alone, packed)
        if searches[name].together.seconds is not None or each[name].seconds is None:
            most = next((r.max_nodes for r in rooms if r.name == searches[name].together.room), 0)
            each[name] = replace(searches[name].together, nodes=min(searches[name].together.nodes, most))
    whole = total(each, {n: s.needs for n, s in made.steps.items()}, profile)
    return Foreseen(steps=each, total=whole, searches=searches, profile=profile)


def _packed(asks: Resources, one: Estimate, times: int, rooms: Sequence[Room]) -> int:
    """On how many machines a step is that runs several times at once, if there are as many where it runs alone."""
    room = next((replace(r, max_nodes=times * one.nodes) for r in rooms if r.name == one.room), None)
    found = None if room is None else nodes_in(room, replace(asks, workers=times * asks.least), one.footprint)
    return found or times * one.nodes


def repetitions(
    made: Plan, state: Mapping[str, str], there: Callable[[], Capacity], catalog: Catalog | None = None
) -> dict[str, Repetition]:
    """What each step of a plan repeats that does and is not stored; `there` is asked for the cluster where one does."""
    catalog = catalog or Catalog(bring(made.spec.code))
    runs = [s for s in made.steps.values() if state[s.name] != "stored"]
    found = [s.name for s in runs if repeated(s.name, made.spec, catalog.operator(s.operator))]
    return {n: repetition(n, made.spec, catalog, there()) for n in found}


def prospects(made: Plan, storage: Storage, *, hashed: bool = True) -> dict[str, str]:
    """What becomes of each step: ``stored``, ``runs``, ``runs (effect)``, or ``unknown`` until inputs are hashed."""
    stored = Store(storage).hits(s.fingerprint for s in made.steps.values() if s.fingerprint)
    return {n: _prospect(s, stored, hashed=hashed) for n, s in made.steps.items()}


def _prospect(step: PlannedStep, stored: Collection[str], *, hashed: bool) -> str:
    if step.effect:
        return "runs (effect)"
    if not step.fingerprint and not hashed:  # a run hashes its inputs
        return "unknown"
    return "stored" if step.fingerprint in stored else "runs"


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
