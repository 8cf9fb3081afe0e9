"""YAML text or Python steps -> Spec: a pipeline as data, the same however it was written.

Everything that can be known from the text alone is checked here, and all of it is reported at once.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from lfm.errors import HyperparameterError, LfmError
from lfm.method import Method
from operators.artifact import KINDS, Artifact, kind_of
from operators.base import Edge, Operator, Resources, Step
from operators.catalog import Catalog, method_name
from operators.code import Code

ANYTHING, RESOURCES = TypeAdapter(Any), TypeAdapter(Resources)  # made once: making one takes a millisecond
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's reads ten times as fast

Reference = str | tuple[str, ...] | Mapping[str, str]
"""What fills an edge: the name of an input or step, several, or several with names of their own."""


class SpecError(LfmError, ValueError):
    """A pipeline that cannot mean anything: every problem found, each a sentence that starts with where."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpec:
    """One step; `inputs` hold names of pipeline inputs or of other steps, never values."""

    operator: str
    inputs: Mapping[str, Reference]
    method: Method | None = None
    params: Mapping[str, object] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)

    def references(self) -> tuple[str, ...]:
        """Every name that fills an edge, each once."""
        return tuple(dict.fromkeys(n for r in self.inputs.values() for n in names_in(r)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A whole pipeline."""

    name: str
    inputs: Mapping[str, Artifact]
    steps: Mapping[str, StepSpec]
    code: Code = field(default_factory=Code)


def names_in(reference: Reference) -> tuple[str, ...]:
    """The names that a reference holds, in order."""
    if isinstance(reference, str):
        return (reference,)
    return tuple(reference.values()) if isinstance(reference, Mapping) else tuple(reference)


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
        changes: ``a.b=value``, applied before anything is checked (`apply`).

    Raises:
        SpecError: With every problem of the text.
    """
    spec, problems = parse(text, source=source, catalog=catalog, code=code, changes=changes)
    if problems:
        raise SpecError(tuple(problems))
    return spec


def parse(
    text: str, *, source: str = "pipeline", catalog: Catalog | None = None, code: Code | None = None,
    changes: Sequence[str] = (),
) -> tuple[Spec, list[str]]:  # fmt: skip
    """The same as `load`, but what is right comes back together with the problems of what is not."""
    reader = _Reader(source)
    raw = reader.read(text)
    builder = _Builder(catalog or Catalog(), reader.where)
    builder.problems += reader.problems
    if isinstance(raw, dict):
        for change in changes:
            builder.change(raw, change)
    return builder.spec(raw, code or Code()), builder.problems


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
    spec, problems = follow(pipeline, code=code, catalog=catalog, changes=changes)
    if problems:
        raise SpecError(tuple(problems))
    return spec


def follow(
    pipeline: Callable[..., Any], *, code: Code | None = None, catalog: Catalog | None = None,
    changes: Sequence[str] = (),
) -> tuple[Spec, list[str]]:  # fmt: skip
    """The same as `trace`, but what is right comes back together with the problems of what is not."""
    parameters = inspect.signature(pipeline).parameters
    inputs = {k: p.default for k, p in parameters.items()}
    missing = [k for k, v in inputs.items() if not isinstance(v, Artifact)]
    if missing:
        where = f"{pipeline.__name__}({missing[0]})"
        raise SpecError((f"{where}: no default, expected one such as Model('hf://...'). Give every input one.",))
    last = pipeline(**inputs)
    named = {id(a): k for k, a in inputs.items()}
    steps: dict[str, Any] = {}
    for step in last if isinstance(last, tuple | list) else (last,):
        _collect(step, named, steps)
    raw = {
        "name": pipeline.__name__.replace("_", "-"),
        "inputs": {k: {kind_of(type(a)): a.uri} for k, a in inputs.items()},
        "steps": steps,
    }
    return build(raw, pipeline.__name__, code=code, catalog=catalog, changes=changes)


def build(
    raw: dict[str, Any], source: str, *, code: Code | None = None, catalog: Catalog | None = None,
    changes: Sequence[str] = (),
) -> tuple[Spec, list[str]]:  # fmt: skip
    """A spec from plain values, such as `dump` gives, and the problems of what is not right."""
    builder = _Builder(catalog or Catalog(), lambda path: source)
    for change in changes:
        builder.change(raw, change)
    return builder.spec(raw, code or Code()), builder.problems


def _collect(source: Any, named: Mapping[int, str], steps: dict[str, Any]) -> Any:
    """The name of a step or an input, after writing down every step that it needs."""
    if isinstance(source, tuple | list):
        return [_collect(s, named, steps) for s in source]
    if isinstance(source, Mapping):
        return {k: _collect(s, named, steps) for k, s in source.items()}
    if not isinstance(source, Step):
        return named.get(id(source), repr(source))
    if source.name not in steps:
        inputs = {k: _collect(v, named, steps) for k, v in source.inputs.items()}
        method = source.method
        fields = {} if method is None else {"name": method_name(type(method)), **method.hyperparameters()}
        steps[source.name] = {
            "operator": source.operator.name,
            "inputs": inputs,
            **({"method": fields} if fields else {}),
            "params": dict(source.params),
            "resources": RESOURCES.dump_python(source.resources),
        }
    return source.name


def dump(spec: Spec) -> dict[str, Any]:
    """The pipeline as plain values, from which `build`, or `load` once they are YAML, make an equal `Spec`."""
    steps = {}
    for name, step in spec.steps.items():
        method = step.method
        steps[name] = {
            "operator": step.operator,
            "inputs": {k: list(v) if isinstance(v, tuple) else v for k, v in step.inputs.items()},
            **(
                {"method": {"name": method_name(type(method)), **method.hyperparameters()}}
                if method is not None
                else {}
            ),
            "params": dict(step.params),
            "resources": RESOURCES.dump_python(step.resources),
        }
    inputs = {k: {kind_of(type(a)): a.uri} for k, a in spec.inputs.items()}
    return {"name": spec.name, "uses": list(spec.code.uses), "inputs": inputs, "steps": steps}


def near(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: what was probably meant, or all there is."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=3)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    return f"Known: {', '.join(known) or 'none'}."


class _Reader:
    """YAML -> plain values, remembering the line of every key and refusing a key that stands twice."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[tuple[str, ...], int] = {}
        self.problems: list[str] = []

    def read(self, text: str) -> Any:
        try:
            root = yaml.compose(text, Loader=LOADER)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            self.problems.append(f"{self.source}{line}: not YAML, {getattr(error, 'problem', error)}.")
            return {}
        return {} if root is None else self._value(root, ())

    def where(self, path: tuple[str, ...]) -> str:
        while path and path not in self.lines:
            path = path[:-1]
        line = f":{self.lines[path]}" if path in self.lines else ""
        return f"{self.source}{line}"

    def _value(self, node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                line = key_node.start_mark.line + 1
                if key in found:
                    first = self.lines[(*path, key)]
                    self.problems.append(f"{self.source}:{line}: the key {key!r} stands twice, first in line {first}.")
                self.lines[(*path, key)] = line
                found[key] = self._value(value_node, (*path, key))
            return found
        if isinstance(node, yaml.SequenceNode):
            return [self._value(v, (*path, str(i))) for i, v in enumerate(node.value)]
        loader = yaml.SafeLoader("")
        return loader.construct_object(node)


class _Builder:
    """Plain values -> `Spec`, collecting problems instead of stopping at the first."""

    def __init__(self, catalog: Catalog, where: Callable[[tuple[str, ...]], str]) -> None:
        self.catalog, self.where = catalog, where
        self.problems: list[str] = []

    def refuse(self, path: tuple[str, ...], sentence: str) -> None:
        step = f" step {path[1]!r}" if path[:1] == ("steps",) and len(path) > 1 else ""
        self.problems.append(f"{self.where(path)}{step}: {sentence}")

    def spec(self, raw: Any, code: Code) -> Spec:
        raw = self._mapping((), raw, {"name", "uses", "inputs", "steps"})
        given = self._entries(raw, "inputs")
        inputs = {k: a for k, v in given if (a := self._input(k, v)) is not None}
        steps: dict[str, StepSpec] = {}
        written = self._entries(raw, "steps")
        names = [k for k, _ in (*given, *written)]
        for name in {k for k, _ in given} & {k for k, _ in written}:
            self.refuse(("steps", name), "an input has this name too. Give one of them another name.")
        made: dict[str, type[Artifact]] = {k: type(a) for k, a in inputs.items()}
        for name, value in written:
            step = self._step(name, value, set(names))
            if step is not None:
                steps[name] = step
                made[name] = self.catalog.operator(step.operator).makes(step.method)
        for name, step in steps.items():
            self._edges(name, step, made)
        self._cycle(steps)
        if not raw.get("steps"):
            self.refuse((), "no steps, expected at least one under 'steps:'.")
        return Spec(name=str(raw.get("name") or "pipeline"), inputs=inputs, steps=steps, code=code)

    def change(self, raw: dict[str, Any], text: str) -> None:
        """Apply ``input=URI``, ``step=URI`` (the step becomes an input) or ``step.field=value``."""
        target, equals, value = text.partition("=")
        where, _, key = target.partition(".")
        steps, inputs = raw.setdefault("steps", {}), raw.setdefault("inputs", {})
        if not equals:
            self.problems.append(f"--set {text}: no '=', expected NAME=VALUE.")
        elif not key and where in inputs:
            inputs[where] = {next(iter(inputs[where])): value}
        elif not key and where in steps:
            self._replace(raw, where, value)
        elif where not in steps:
            self.problems.append(
                f"--set {text}: no input or step is called {where!r}. {near(where, [*inputs, *steps])}"
            )
        else:
            self._assign(steps[where], text, key, yaml.safe_load(value))

    def _replace(self, raw: dict[str, Any], name: str, uri: str) -> None:
        """Turn a step into an input, and drop the steps that only it needed."""
        steps = raw["steps"]
        needed_before = _used(steps)
        verb = steps.pop(name).get("operator")
        try:
            kind = kind_of(self.catalog.operator(verb).gives[0])
        except LfmError:
            kind = "model"
        raw["inputs"][name] = {kind: uri}
        while orphans := [s for s in steps if s in needed_before and s not in _used(steps)]:
            for orphan in orphans:
                del steps[orphan]

    def _assign(self, step: dict[str, Any], text: str, key: str, value: object) -> None:
        section, _, inner = key.partition(".")
        if inner and section in ("method", "params", "resources", "inputs"):
            step.setdefault(section, {})[inner] = value
            return
        try:
            found = self.catalog.operator(step["operator"])
            fields = set(getattr(self._method_class(found, step), "__dataclass_fields__", ()))
        except (LfmError, KeyError):
            return  # the operator or method is unknown, which is a problem of its own
        if key in fields:
            step["method"][key] = value
        elif key in found.params:
            step.setdefault("params", {})[key] = value
        elif key in Resources.__dataclass_fields__:
            step.setdefault("resources", {})[key] = value
        else:
            known = [*fields, *found.params, *Resources.__dataclass_fields__]
            self.problems.append(f"--set {text}: the step has no field {key!r}. {near(key, known)}")

    def _method_class(self, verb: Operator[Any], step: Mapping[str, Any]) -> type[Method] | None:
        method = step.get("method")
        if verb.family is None or not isinstance(method, dict) or "name" not in method:
            return None
        return self.catalog.method(verb.family, str(method["name"]))

    def _entries(self, raw: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
        value = raw.get(key)
        if value is None:
            return []
        return list(self._mapping((key,), value).items())

    def _mapping(self, path: tuple[str, ...], value: Any, known: set[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.refuse(path, f"{value!r}, expected a mapping.")
            return {}
        for key in value if known is not None else ():
            if key not in known:  # type: ignore[operator]
                self.refuse((*path, key), f"unknown key {key!r}. {near(key, known or ())}")
        return value

    def _input(self, name: str, raw: Any) -> Artifact | None:
        path = ("inputs", name)
        if not isinstance(raw, dict) or len(raw) != 1:
            self.refuse(path, f"input {name!r} is {raw!r}, expected one pair such as {{model: URI}}.")
            return None
        ((kind, uri),) = raw.items()
        if kind not in KINDS:
            self.refuse(path, f"input {name!r} is of kind {kind!r}. {near(kind, KINDS)}")
            return None
        return KINDS[kind](str(uri))

    def _step(self, name: str, raw: Any, names: set[str]) -> StepSpec | None:
        path = ("steps", name)
        before = len(self.problems)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            self.refuse(path, "expected a name of letters, digits, '_' and '-' that starts with a letter.")
        raw = self._mapping(path, raw, {"operator", "inputs", "method", "params", "resources"})
        try:
            verb = self.catalog.operator(str(raw.get("operator")))
        except LfmError as error:
            self.refuse((*path, "operator"), str(error))
            return None
        inputs = self._references((*path, "inputs"), raw.get("inputs") or {}, verb, names)
        method = self._method((*path, "method"), raw.get("method"), verb)
        params = self._params((*path, "params"), raw.get("params") or {}, verb)
        resources = self._resources((*path, "resources"), raw.get("resources"), verb)
        if len(self.problems) > before:
            return None
        return StepSpec(operator=verb.name, inputs=inputs, method=method, params=params, resources=resources)

    def _references(
        self, path: tuple[str, ...], raw: Any, verb: Operator[Any], names: set[str]
    ) -> dict[str, Reference]:
        found: dict[str, Reference] = {}
        for key, value in self._mapping(path, raw, set(verb.edges)).items():
            edge = verb.edges.get(key)
            if edge is None:
                continue
            reference = self._reference((*path, key), value, edge)
            for name in names_in(reference):
                if name not in names:
                    self.refuse((*path, key), f"no input or step is called {name!r}. {near(name, names)}")
            found[key] = reference
        for key, edge in verb.edges.items():
            if edge.required and key not in found:
                self.refuse(path, f"{verb.name!r} needs the input {key!r}.")
        return found

    def _reference(self, path: tuple[str, ...], value: Any, edge: Edge) -> Reference:
        if edge.many == "one":
            if isinstance(value, str):
                return value
            self.refuse(path, f"{value!r}, expected one name.")
            return ()
        if edge.many == "mapping" and isinstance(value, dict):
            return {k: str(v) for k, v in value.items()}
        if isinstance(value, list | tuple | str):
            several = (value,) if isinstance(value, str) else tuple(map(str, value))
            return {n: n for n in several} if edge.many == "mapping" else several
        self.refuse(path, f"{value!r}, expected a list of names.")
        return ()

    def _method(self, path: tuple[str, ...], raw: Any, verb: Operator[Any]) -> Method | None:
        if verb.family is None:
            if raw is not None:
                self.refuse(path, f"{verb.name!r} takes no method.")
            return None
        if not isinstance(raw, dict) or "name" not in raw:
            self.refuse(path, f"{raw!r}, expected {{name: ...}}. {near('', self.catalog.methods(verb.family))}")
            return None
        try:
            found = self.catalog.method(verb.family, str(raw["name"]))
        except LfmError as error:
            self.refuse((*path, "name"), str(error))
            return None
        fields = {k: v for k, v in raw.items() if k != "name"}
        known = list(getattr(found, "__dataclass_fields__", ()))
        made: Method | None = self._validated(path, found, fields, found.__name__, known)
        return made

    def _params(self, path: tuple[str, ...], raw: Any, verb: Operator[Any]) -> dict[str, object]:
        """The parameters as plain values, which is how they are hashed and sent; all of them, defaults too."""
        found: dict[str, object] = {}
        before = len(self.problems)
        for key, value in self._mapping(path, raw, set(verb.params)).items():
            if key in verb.params:
                found[key] = self._validated((*path, key), verb.params[key].hint, value, f"{verb.name}: {key}")
        for key, parameter in verb.params.items():
            if parameter.required and key not in found:
                self.refuse(path, f"{verb.name!r} needs the parameter {key!r}.")
            elif key not in found:
                found[key] = parameter.default
        if len(self.problems) == before:
            try:
                verb.arguments(found)
            except HyperparameterError as error:
                self.refuse((*path, error.field), f"{verb.name}: {error}")
        return {k: ANYTHING.dump_python(v, mode="json") for k, v in found.items()}

    def _resources(self, path: tuple[str, ...], raw: Any, verb: Operator[Any]) -> Resources:
        if raw is None:
            return verb.resources
        asked = {**RESOURCES.dump_python(verb.resources), **self._mapping(path, raw)}
        made = self._validated(path, Resources, asked, "resources", list(Resources.__dataclass_fields__))
        return made if isinstance(made, Resources) else verb.resources

    def _validated(self, path: tuple[str, ...], hint: Any, value: Any, what: str, known: Sequence[str] = ()) -> Any:
        try:
            return TypeAdapter(hint).validate_python(value)
        except ValidationError as error:
            for problem in error.errors():
                at = tuple(str(p) for p in problem["loc"])
                cause = problem.get("ctx", {}).get("error")
                if isinstance(cause, LfmError):
                    self.refuse((*path, *at), str(cause))
                elif problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                    self.refuse((*path, *at), f"{what} has no field {at[-1]!r}. {near(at[-1], known)}")
                else:
                    name = f"{what}: {'.'.join(at)}" if at else what
                    sentence = problem["msg"][0].lower() + problem["msg"][1:]
                    self.refuse((*path, *at), f"{name}={problem['input']!r}, {sentence}.")
            return None

    def _edges(self, name: str, step: StepSpec, made: Mapping[str, type[Artifact]]) -> None:
        verb = self.catalog.operator(step.operator)
        for key, reference in step.inputs.items():
            for source in names_in(reference):
                kind = made.get(source)
                if kind is not None and kind not in verb.edges[key].kinds:
                    wanted = " or ".join(kind_of(k) for k in verb.edges[key].kinds)
                    path = ("steps", name, "inputs", key)
                    self.refuse(path, f"{key}={source!r} is a {kind_of(kind)}, expected a {wanted}.")

    def _cycle(self, steps: Mapping[str, StepSpec]) -> None:
        try:
            tuple(TopologicalSorter({n: s.references() for n, s in steps.items()}).static_order())
        except CycleError as error:
            self.refuse(("steps", error.args[1][0]), f"the steps form a cycle: {' -> '.join(error.args[1])}.")


def _used(steps: Mapping[str, Any]) -> set[str]:
    """Every name that some step takes as an input, in the raw form."""
    found: set[str] = set()
    for step in steps.values():
        for value in (step.get("inputs") or {}).values():
            found |= {value} if isinstance(value, str) else set(value.values() if isinstance(value, dict) else value)
    return found
