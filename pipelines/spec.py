"""YAML text or Python steps -> Spec: a pipeline as data, the same however it was written.

Everything that can be known from the text alone is checked here, and all of it is reported at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from operators.artifact import Artifact, kind_of
from operators.base import Resources
from operators.catalog import Catalog, method_name
from operators.code import Code
from pipelines.builder import Builder
from pipelines.changes import change
from pipelines.fields import plain
from pipelines.problems import Places, Problem, SpecError as SpecError
from pipelines.steps import Reference as Reference, StepSpec as StepSpec, names_in as names_in
from pipelines.text import Text
from pipelines.tracing import RESOURCES as RESOURCES, Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A whole pipeline."""

    name: str
    inputs: Mapping[str, Artifact]
    steps: Mapping[str, StepSpec]
    code: Code = field(default_factory=Code)


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A pipeline as far as it could be read.

    Attributes:
        spec: Without what is wrong in it.
        problems: All of that.
        places: Where everything is written.
        names: Of all steps, also of those that `spec` lacks.
        asks: What steps ask for, also some that `spec` lacks.
        taken: What steps take, also those that `spec` lacks.
    """

    spec: Spec
    problems: tuple[Problem, ...]
    places: Places
    names: tuple[str, ...] = ()
    asks: Mapping[str, Resources] = field(default_factory=dict)
    taken: frozenset[str] = frozenset()

    def whole(self) -> Spec:
        """The pipeline.

        Raises:
            SpecError: There is a problem.
        """
        if self.problems:
            raise SpecError(self.places.sentences(self.problems))
        return self.spec


def load(
    text: str, *, source: str = "pipeline", catalog: Catalog | None = None, code: Code | None = None,
    changes: Sequence[str] = (),
) -> Spec:  # fmt: skip
    """Read a pipeline written in YAML.

    Args:
        text: The file's text.
        source: What messages call the file.
        catalog: The operators and methods that it may name.
        code: The user's files behind the catalog.
        changes: ``a.b=value``, applied before anything is checked (`change`).

    Raises:
        SpecError: With every problem of the text.
    """
    return parsed(Text(text, source), catalog=catalog, code=code, changes=changes).whole()


def parsed(
    text: Text, *, catalog: Catalog | None = None, code: Code | None = None, changes: Sequence[str] = (),
    partial: bool = False,
) -> Draft:  # fmt: skip
    """The same as `load` of a text that was read, but what is right comes back together with the problems.

    Args:
        text: The text.
        catalog: The operators and methods that it may name.
        code: The user's files behind the catalog.
        changes: ``a.b=value``, applied before anything is checked (`change`).
        partial: The user's files could not be read: names that may be defined there are no problem.
    """
    draft = build(text.raw, text.places, code=code, catalog=catalog, changes=changes, partial=partial)
    if text.raw is None and text.problems:
        return Draft(spec=draft.spec, problems=tuple(text.problems), places=text.places)
    return replace(draft, problems=(*text.problems, *draft.problems))


def trace(
    pipeline: Callable[..., Any], *, code: Code | None = None, catalog: Catalog | None = None,
    changes: Sequence[str] = (),
) -> Spec:  # fmt: skip
    """Read a pipeline written in Python: a function from artifacts to its last step, or to several.

    The function's parameters are the pipeline's inputs and their defaults say where those come from; its name,
    with dashes, is the pipeline's. It goes through the same checks as YAML, so both give the same `Spec`.

    Raises:
        SpecError: With every problem found.
    """
    return followed(pipeline, code=code, catalog=catalog, changes=changes).whole()


def followed(
    pipeline: Callable[..., Any], *, code: Code | None = None, brought: Code | None = None,
    catalog: Catalog | None = None, changes: Sequence[str] = (),
) -> Draft:  # fmt: skip
    """The same as `trace`, but what is right comes back together with the problems of what is not.

    Args:
        pipeline: The function.
        code: The user's files behind the catalog.
        brought: All of the user's files, where `code` leaves some out.
        catalog: The operators and methods that it may name.
        changes: ``a.b=value``, applied before anything is checked (`change`).

    Raises:
        OwnCodeFailed: The function raised.
    """
    made = Trace(pipeline, brought or code or Code())
    if made.raw is None or (made.problems and not made.raw["steps"]):
        empty = Spec(name=pipeline.__name__, inputs={}, steps={})
        return Draft(spec=empty, problems=tuple(made.problems), places=made.places)
    draft = build(made.raw, made.places, code=code, catalog=catalog, changes=changes)
    return replace(draft, problems=(*made.problems, *draft.problems))


def build(
    raw: Any, places: Places, *, code: Code | None = None, catalog: Catalog | None = None,
    changes: Sequence[str] = (), partial: bool = False,
) -> Draft:  # fmt: skip
    """A pipeline from plain values, such as `dump` gives; `partial` as in `parsed`."""
    catalog, code = catalog or Catalog(), code or Code()
    found = [change(raw, c, catalog, places) for c in changes] if isinstance(raw, dict) else []
    read = Builder(raw, catalog, code, partial=partial)
    return Draft(
        spec=Spec(name=read.name, inputs=read.inputs, steps=read.steps, code=code),
        problems=(*(p for p in found if p is not None), *read.problems),
        places=places,
        names=read.names,
        asks=read.asks,
        taken=read.taken,
    )


def needs(step: StepSpec, spec: Spec) -> tuple[str, ...]:
    """The steps whose results a step takes."""
    return tuple(n for n in step.references() if n in spec.steps)


def needed(spec: Spec, until: str) -> set[str]:
    """The step `until` and all that it needs; every step where it is empty."""
    if not until:
        return set(spec.steps)
    found: set[str] = set()
    queue = [until]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += needs(spec.steps[name], spec)
    return found


def dump(spec: Spec) -> dict[str, Any]:
    """The pipeline as plain values, from which `build`, or `load` once they are YAML, make an equal `Spec`."""
    steps = {}
    for name, step in spec.steps.items():
        method = step.method
        steps[name] = {
            "operator": step.operator,
            "inputs": {k: list(v) if isinstance(v, tuple) else v for k, v in step.inputs.items()},
            **(
                {"method": {"name": method_name(type(method)), **plain(method.hyperparameters())}}
                if method is not None
                else {}
            ),
            "params": dict(step.params),
            "resources": RESOURCES.dump_python(step.resources),
        }
    inputs = {k: {kind_of(type(a)): a.uri} for k, a in spec.inputs.items()}
    return {"name": spec.name, "uses": list(spec.code.uses), "inputs": inputs, "steps": steps}
