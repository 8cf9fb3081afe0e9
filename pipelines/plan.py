"""Spec -> Plan: steps in running order, each with the fingerprint of everything that decides its output."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from graphlib import TopologicalSorter
from typing import Any, Protocol

import lfm
from lfm.errors import LfmError
from operators.artifact import Artifact, Model, kind_of
from operators.base import Edge, Operator, Problems, Resources
from operators.catalog import ENSEMBLES, READ_BY_NAME, Catalog, method_name
from operators.code import module_name, own
from operators.models.ensemble_files import INSTEAD, is_ensemble
from operators.training import Training
from pipelines.fields import plain
from pipelines.problems import Part, Problem, unknown_step
from pipelines.searches import space_problems, varied_methods
from pipelines.source import Reach, reach
from pipelines.spec import Reference, Spec, StepSpec, names_in, needed, needs


class PlanError(LfmError, ValueError):
    """A pipeline that could not run here: every problem found, each a sentence that starts with where."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class InputProblem(LfmError, ValueError):
    """An input that is not there, or is not what it is said to be."""

    def __init__(self, uri: str, what: str, fix: str) -> None:
        super().__init__(uri, what, fix)
        self.uri, self.what, self.fix = uri, what, fix

    def __str__(self) -> str:
        return f"{self.uri!r} {self.what}. {self.fix}"


class Inspector(Protocol):
    """The plan's only eyes: reads headers, hashes and pins of what comes from outside."""

    def check(self, artifact: Artifact) -> Artifact | None:
        """Look at an input without reading it whole.

        Returns:
            It with a path of this machine (or a ``python://`` name), if it has one. Of what lies elsewhere only the
            headers are there: the values of its weights are zeros, and most of its rows are missing.

        Raises:
            InputProblem: It is missing, unreadable, empty or of a scheme that nothing reads.
        """

    def pin(self, artifact: Artifact) -> Artifact:
        """The same artifact with its digest, or without one where that was not wanted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """One step with everything that decides when it may run and whether it has to.

    Attributes:
        needs: The steps whose results it takes.
        fingerprint: Names its result; steps with equal fingerprints make the same thing. Empty where something that
            decides it could not be hashed.
        unhashed: What that is, a clause each.
        components: What the fingerprint is a hash of, so that two can be compared.
        effect: It changes the world instead of making an artifact, so no stored result replaces it.
        starts_workers: What it starts asks for its resources; its own task asks for none.
        trains: It follows a gradient, so that its micro-batch may be smaller without another result.
        repeats: Its trials, which are runs, ask for resources; it needs none itself.
        earlier: Where it changes midway, the fingerprints of the same step without its last changes, and up to how
            many steps that one does the same: its checkpoints up to there are as good as its own. The latest first.
    """

    name: str
    operator: str
    inputs: Mapping[str, Reference]
    method: tuple[str, Mapping[str, Any]] | None
    params: Mapping[str, object]
    resources: Resources
    kind: str
    effect: bool
    starts_workers: bool
    trains: bool
    needs: tuple[str, ...]
    fingerprint: str
    components: Mapping[str, Any]
    unhashed: tuple[str, ...] = ()
    repeats: bool = False
    earlier: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Steps by name, in an order in which they may run.

    Attributes:
        spec: What was asked for.
        inputs: What comes from outside, pinned.
    """

    spec: Spec
    inputs: Mapping[str, Artifact]
    steps: Mapping[str, PlannedStep]


def plan(spec: Spec, inspector: Inspector, catalog: Catalog | None = None, *, until: str = "") -> Plan:
    """Order the steps of `spec`, pin its inputs and fingerprint each step.

    Args:
        spec: The pipeline.
        inspector: Looks at what comes from outside.
        catalog: The operators that `spec` names.
        until: Leave out every step that this one does not need; empty keeps all.

    Raises:
        PlanError: With every problem that `survey` finds.
    """
    catalog = catalog or Catalog()
    problems = survey(spec, inspector, catalog, until=until)
    if problems:
        raise PlanError(tuple(map(str, problems)))
    return pinned(spec, inspector, catalog, until=until)


def pinned(spec: Spec, inspector: Inspector, catalog: Catalog, *, until: str = "") -> Plan:
    """The same as `plan`, of what `survey` has found nothing wrong with."""
    order = TopologicalSorter({n: needs(s, spec) for n, s in spec.steps.items()}).static_order()
    wanted = needed(spec, until)
    inputs = {n: inspector.pin(spec.inputs[n]) for n in _used(spec, wanted)}
    known = {n: f"{kind_of(type(a))}:{a.digest}" if a.digest else "" for n, a in inputs.items()}
    steps: dict[str, PlannedStep] = {}
    reached = cache(partial(reach, code=spec.code))  # many steps have one operator
    for name in order:
        if name in wanted:
            steps[name] = _planned(name, spec, catalog, known, reached)
            known[name] = steps[name].fingerprint
    return Plan(spec=spec, inputs=inputs, steps=steps)


def survey(
    spec: Spec, inspector: Inspector, catalog: Catalog, *, until: str = "", besides: Collection[str] = ()
) -> list[Problem]:
    """Everything that is wrong with what `spec` needs from outside; reads headers, hashes nothing.

    Args:
        spec: The pipeline.
        inspector: Looks at what comes from outside.
        catalog: The operators that `spec` names.
        until: Leave out every step that this one does not need; empty keeps all.
        besides: Inputs to look at although no step of `spec` takes them.
    """
    if until and until not in spec.steps:
        return [unknown_step("--until", until, spec.steps)]
    wanted = needed(spec, until)
    problems = []
    seen: dict[str, Artifact] = {}
    for name in dict.fromkeys((*_used(spec, wanted), *(n for n in spec.inputs if n in besides))):
        try:
            here = inspector.check(spec.inputs[name])
            if here is not None:
                seen[name] = here
        except InputProblem as problem:
            problems.append(Problem(("inputs", name), str(problem)))
    for name, step in spec.steps.items():
        if name not in wanted:
            continue
        verb = catalog.operator(step.operator)
        if not trains(verb):
            problems += _spread(name, step, verb)
        problems += _ensembles(name, step, verb, seen, spec, catalog)
        problems += space_problems(name, spec, catalog)
        if verb.problems is not None:
            clauses = _foreseen(step, verb, verb.problems, seen, spec, catalog)
            problems += [Problem(("steps", name, *_about(clause, step, verb)), clause) for clause in clauses]
    return problems


def trains(verb: Operator[Any]) -> bool:
    """Whether an operator follows a gradient."""
    return Training in verb.bundles.values()


def _spread(name: str, step: StepSpec, verb: Operator[Any]) -> Iterator[Problem]:
    """What a step that trains nothing asks for and would not use."""
    asks = step.resources
    for field, unused, why, only in (
        ("strategy", asks.strategy != "single", "trains nothing", "'single'"),
        ("workers", asks.most > 1 and not (verb.starts_workers or verb.shares_work), "starts no workers", "1"),
        ("workers", asks.elastic and (verb.starts_workers or verb.shares_work), "trains nothing", "one number"),
        ("out_of_memory", asks.out_of_memory == "micro_batch", "trains nothing", "'memory' or 'nothing'"),
    ):
        if unused:
            given = asks.spoken if field == "workers" else repr(getattr(asks, field))
            said = f"{field}={given} for {verb.name!r}, which {why}, expected {only}. Leave it out."
            yield Problem(("steps", name, "resources", field), said)


def _ensembles(
    name: str, step: StepSpec, verb: Operator[Any], seen: Mapping[str, Artifact], spec: Spec, catalog: Catalog
) -> Iterator[Problem]:
    """The models made of several that a step is given where its verb knows plain ones alone."""
    for key, reference in step.inputs.items():
        for given in () if key in verb.takes_ensembles else names_in(reference):
            if _is_ensemble(given, seen, spec, catalog):
                said = f"{key}: {given!r} is an ensemble, expected a plain model for {verb.name!r}. {INSTEAD}"
                yield Problem(("steps", name, "inputs", key), said)


def _is_ensemble(name: str, seen: Mapping[str, Artifact], spec: Spec, catalog: Catalog) -> bool:
    """Whether an input or a step will be a model that is made of several, as far as is known."""
    if name not in spec.steps:
        found = seen.get(name)
        return isinstance(found, Model) and is_ensemble(found.path)
    verb = catalog.operator(spec.steps[name].operator)
    handed_on = spec.steps[name].inputs.get(verb.hands_on or verb.follows)
    return verb.makes_ensembles or (isinstance(handed_on, str) and _is_ensemble(handed_on, seen, spec, catalog))


def _about(clause: str, step: StepSpec, verb: Operator[Any]) -> Part:
    """The part of a step that an operator's clause begins with, as ``length=5`` and ``data: ...`` do."""
    found = re.match(r"\w+", clause)
    word = found[0] if found else ""
    if word == type(step.method).__name__:
        return ("method",)
    homes = {"params": step.params, "inputs": verb.edges, "resources": Resources.__dataclass_fields__}
    return next(((section, word) for section, known in homes.items() if word in known), ())


def _foreseen(
    step: StepSpec, verb: Operator[Any], ask: Problems, seen: Mapping[str, Artifact], spec: Spec, catalog: Catalog
) -> list[str]:
    """What the operator itself says is wrong, given those of its inputs that can be looked at."""
    try:
        with own(spec.code):
            return list(ask(**arguments(step, verb, seen, spec, catalog)))
    except LfmError as error:
        return [str(error)]


def arguments(
    step: StepSpec, verb: Operator[Any], seen: Mapping[str, Artifact], spec: Spec, catalog: Catalog
) -> dict[str, Any]:
    """What an operator is asked with before anything runs, given those of its inputs that can be looked at."""

    def one(name: str, edge: Edge) -> Artifact | None:
        found = seen.get(name)
        return found if isinstance(found, edge.kinds) else None  # of another kind, which is a problem of its own

    given: dict[str, Any] = {}
    for key, edge in verb.edges.items():
        reference = step.inputs.get(key)
        if reference is None or isinstance(reference, str):
            given[key] = None if reference is None else one(reference, edge)
        elif isinstance(reference, Mapping):
            given[key] = {k: one(n, edge) for k, n in reference.items()}
        else:
            given[key] = [one(n, edge) for n in reference]
    method = {} if verb.family is None else {"method": step.method}
    kinds = {key: tuple(_kind(n, spec, catalog) for n in names_in(r)) for key, r in step.inputs.items()}
    return {**given, **method, **verb.validated(step.params), "resources": step.resources, "kinds": kinds}


def _planned(
    name: str, spec: Spec, catalog: Catalog, known: Mapping[str, str], reached: Callable[[tuple[str, ...]], Reach]
) -> PlannedStep:
    step = spec.steps[name]
    verb = catalog.operator(step.operator)
    method = None
    makers: list[Any] = [verb.body]
    if step.method is not None:
        method = (method_name(type(step.method)), plain(step.method.hyperparameters()))
        makers.append(type(step.method))
    makers += varied_methods(name, spec, catalog)
    modules = [m.__module__ for m in makers] + _read_by_name(step, spec, catalog)
    if any("<locals>" in m.__qualname__ for m in makers):  # made by a function, so that its callers decide too
        modules += map(module_name, spec.code.uses)
    sources = reached(tuple(modules))
    inputs = {k: _resolved(r, known) for k, r in step.inputs.items()}
    params = verb.decisive(step.params)

    def canonical_with(params: Mapping[str, object]) -> str:
        return _canonical(
            {
                "operator": step.operator,
                "inputs": inputs,
                "method": method,
                "params": params,
                "order": dict(_orders({"inputs": inputs, "method": method, "params": params})),
                "source": dict(sources.modules),
                "libraries": dict(sources.libraries),
                "accelerator": step.resources.accelerator,
            }
        )

    canonical = canonical_with(params)
    before = _without_last_changes(params) if trains(verb) else ()
    lacking = [n for n in step.references() if not known[n]]
    unhashed = (
        *(f"step {n!r} has none" if n in spec.steps else f"input {n!r} was not hashed" for n in lacking),
        *(f"{line} runs code that no import names" for line in sources.unnamed),
    )
    return PlannedStep(
        name=name,
        operator=step.operator,
        inputs=step.inputs,
        method=method,
        params=step.params,
        resources=step.resources,
        kind=kind_of(_kind(name, spec, catalog)),
        effect=verb.effect,
        starts_workers=verb.starts_workers or step.resources.grouped,
        trains=trains(verb),
        needs=needs(step, spec),
        fingerprint="" if unhashed else _hash(canonical),
        components=json.loads(canonical),
        unhashed=tuple(dict.fromkeys(unhashed)),
        repeats=bool(verb.repeats),
        earlier=() if unhashed else tuple((at, _hash(canonical_with(params))) for at, params in before),
    )


def _without_last_changes(params: Mapping[str, object]) -> Iterator[tuple[int, dict[str, object]]]:
    """A training's parameters without its last change, without its last two, and so on, with where that one is."""
    changes: Any = params["midway"]
    for number in reversed(range(len(changes))):
        yield changes[number]["at"], {**params, "midway": changes[:number]}


def _read_by_name(step: StepSpec, spec: Spec, catalog: Catalog) -> list[str]:
    """The modules of the methods that inputs of the step may name: which one, nobody knows before they are read."""
    kinds = {_kind(name, spec, catalog) for name in step.references()}
    families = {family for kind, family in READ_BY_NAME.items() if kind in kinds}
    if set(step.inputs) & set(catalog.operator(step.operator).takes_ensembles):
        families.add(ENSEMBLES)
    return [f"lfm.{name.replace('/', '.')}" for family in sorted(families) for name in lfm.names(family)]


def _kind(name: str, spec: Spec, catalog: Catalog) -> type[Artifact]:
    """What an input or a step will hold; `Artifact` of a name that nobody has, which is a problem of its own."""
    if name in spec.inputs:
        return type(spec.inputs[name])
    if name not in spec.steps:
        return Artifact
    step = spec.steps[name]
    verb = catalog.operator(step.operator)
    followed = step.inputs.get(verb.follows)
    return _kind(followed, spec, catalog) if isinstance(followed, str) else verb.makes(step.method, step.params)


def _canonical(components: Mapping[str, Any]) -> str:
    return json.dumps(components, sort_keys=True, separators=(",", ":"))


def _hash(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()


def _orders(value: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """The keys of every mapping that is not written in their order, by dotted path: its reader may go by it."""
    if isinstance(value, Mapping):
        if path.count(".") and list(value) != sorted(value):
            yield path, list(value)
        for key, inner in value.items():
            yield from _orders(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _orders(inner, f"{path}[{number}]")


def of_run(made: Plan, run: str) -> Plan:
    """The same plan, in which a step that could not be hashed has a fingerprint that no other run has.

    So its result is never taken for another's, and an interrupted run still knows what it has made.
    """
    steps = {
        n: replace(s, fingerprint=s.fingerprint or _hash(_canonical({**s.components, "run": run, "step": n})))
        for n, s in made.steps.items()
    }
    return replace(made, steps=steps)


def _resolved(reference: Reference, known: Mapping[str, str]) -> Any:
    if isinstance(reference, Mapping):
        return {k: known[n] for k, n in reference.items()}
    return [known[n] for n in names_in(reference)]


def _used(spec: Spec, wanted: set[str]) -> tuple[str, ...]:
    """The inputs that some wanted step takes, in the order in which `spec` names them."""
    taken = {n for s in wanted for n in spec.steps[s].references()}
    return tuple(n for n in spec.inputs if n in taken)
