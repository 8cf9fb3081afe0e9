"""Spec -> Plan: steps in running order, each with the fingerprint of everything that decides its output."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any, Protocol

from lfm.errors import LfmError
from operators.artifact import Artifact, kind_of
from operators.base import Resources
from operators.catalog import Catalog, method_name
from pipelines.source import Code, reach
from pipelines.spec import Reference, Spec, StepSpec, names_in


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

    def pin(self, artifact: Artifact) -> Artifact:
        """The same artifact with its digest.

        Raises:
            InputProblem: It is missing, unreadable, empty or of a scheme that nothing reads.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """One step with everything that decides when it may run and whether it has to.

    Attributes:
        needs: The steps whose results it takes.
        fingerprint: Names its result; steps with equal fingerprints make the same thing.
        components: What the fingerprint is a hash of, so that two can be compared.
        effect: It changes the world instead of making an artifact, so no stored result replaces it.
    """

    name: str
    operator: str
    inputs: Mapping[str, Reference]
    method: tuple[str, Mapping[str, Any]] | None
    params: Mapping[str, object]
    resources: Resources
    kind: str
    effect: bool
    needs: tuple[str, ...]
    fingerprint: str
    components: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Steps by name, in an order in which they may run."""

    name: str
    inputs: Mapping[str, Artifact]
    steps: Mapping[str, PlannedStep]
    code: Code


def plan(spec: Spec, inspector: Inspector, catalog: Catalog | None = None, *, until: str = "") -> Plan:
    """Order the steps of `spec`, pin its inputs and fingerprint each step.

    Args:
        spec: The pipeline.
        inspector: Looks at what comes from outside.
        catalog: The operators that `spec` names.
        until: Leave out every step that this one does not need; empty keeps all.

    Raises:
        PlanError: With every input that is not what it should be.
    """
    catalog = catalog or Catalog()
    order = TopologicalSorter({n: _needs(s, spec) for n, s in spec.steps.items()}).static_order()
    wanted = _ancestors(spec, until) if until else set(spec.steps)
    used = {n for s in wanted for n in spec.steps[s].references()}
    pinned, problems = pin(spec, inspector, used)
    if problems:
        raise PlanError(tuple(problems))
    known = {n: f"{kind_of(type(a))}:{a.digest}" for n, a in pinned.items()}
    steps: dict[str, PlannedStep] = {}
    for name in order:
        if name in wanted:
            steps[name] = _planned(name, spec, catalog, known)
            known[name] = steps[name].fingerprint
    return Plan(name=spec.name, inputs=pinned, steps=steps, code=spec.code)


def pin(spec: Spec, inspector: Inspector, used: set[str]) -> tuple[dict[str, Artifact], list[str]]:
    """The inputs in `used` with their digests, and the problems of those that have none."""
    pinned: dict[str, Artifact] = {}
    problems: list[str] = []
    for name, artifact in spec.inputs.items():
        if name in used:
            try:
                pinned[name] = inspector.pin(artifact)
            except InputProblem as problem:
                problems.append(f"input {name!r}: {problem}")
    return pinned, problems


def _planned(name: str, spec: Spec, catalog: Catalog, known: Mapping[str, str]) -> PlannedStep:
    step = spec.steps[name]
    verb = catalog.operator(step.operator)
    method = None
    modules = [verb.module]
    if step.method is not None:
        method = (method_name(type(step.method)), step.method.hyperparameters())
        modules.append(type(step.method).__module__)
    sources = reach(tuple(modules), spec.code)
    components = {
        "operator": step.operator,
        "inputs": {k: _resolved(r, known) for k, r in step.inputs.items()},
        "method": method,
        "params": dict(step.params),
        "source": dict(sources.modules),
        "libraries": dict(sources.libraries),
        "accelerator": step.resources.accelerator,
    }
    canonical = json.dumps(components, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return PlannedStep(
        name=name,
        operator=step.operator,
        inputs=step.inputs,
        method=method,
        params=step.params,
        resources=step.resources,
        kind=kind_of(verb.makes(step.method)),
        effect=verb.effect,
        needs=_needs(step, spec),
        fingerprint=hashlib.sha256(canonical.encode()).hexdigest(),
        components=json.loads(canonical),
    )


def _resolved(reference: Reference, known: Mapping[str, str]) -> Any:
    if isinstance(reference, Mapping):
        return {k: known[n] for k, n in reference.items()}
    return [known[n] for n in names_in(reference)]


def _needs(step: StepSpec, spec: Spec) -> tuple[str, ...]:
    return tuple(n for n in step.references() if n in spec.steps)


def _ancestors(spec: Spec, last: str) -> set[str]:
    found: set[str] = set()
    queue = [last]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += _needs(spec.steps[name], spec)
    return found
