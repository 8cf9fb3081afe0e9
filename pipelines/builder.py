"""Plain values -> the inputs and steps of a pipeline, with a problem for everything that cannot be meant."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import is_dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePath
from typing import Any

from lfm.errors import LfmError, UnknownName
from lfm.method import Method
from operators.artifact import KINDS, Artifact, kind_of
from operators.base import Edge, Operator, Resources
from operators.catalog import Catalog
from operators.code import Code, OwnCodeFailed, own
from pipelines.fields import object_of, parameters_of
from pipelines.problems import Part, Problem, near, shown
from pipelines.steps import Reference, StepSpec, method_fields, names_in
from pipelines.tracing import RESOURCES, Stray

TOP = ("name", "uses", "inputs", "steps")
STEP = ("operator", "inputs", "method", "params", "resources")
NAME = r"[A-Za-z][A-Za-z0-9_-]*"
NAMES = "letters, digits, '_' and '-', a letter first"


def uses_of(raw: Any) -> tuple[dict[str, str], list[Problem]]:
    """The Python files that a pipeline brings, by their number, and what is wrong with how it names them."""
    uses = raw.get("uses") if isinstance(raw, dict) else None
    if uses is None:
        return {}, []
    if not isinstance(uses, list):
        fix = f" Write uses: [{uses}]." if isinstance(uses, str) else ""
        return {}, [Problem(("uses",), f"uses: {shown(uses)}, expected a list of Python files.{fix}")]
    right, problems = {}, []
    for number, file in enumerate(uses):
        path = PurePath(file) if isinstance(file, str) else None
        if path is None or path.suffix != ".py" or path.is_absolute() or ".." in path.parts:
            allowed = "the path of a .py file beside the pipeline or below it"
            problems.append(Problem(("uses", str(number)), f"uses: {shown(file)}, expected {allowed}."))
        else:
            right[str(number)] = path.as_posix()
    return right, problems


class Builder:
    """Reads a whole pipeline, collecting problems instead of stopping at the first.

    Attributes:
        name: The pipeline's.
        inputs: Those that are right.
        steps: Those that are right.
        problems: Everything else.
        names: Of all steps.
        asks: What steps ask for, where at least that is right.
        taken: The names that steps take, where at least these are right.
    """

    def __init__(self, raw: Any, catalog: Catalog, code: Code, *, partial: bool) -> None:
        """Read.

        Args:
            raw: Plain values; None where there are none.
            catalog: The operators and methods that it may name.
            code: The user's files behind the catalog.
            partial: The user's files could not be read: names that may be defined there are no problem.
        """
        self.catalog, self.code, self.partial = catalog, code, partial
        self.name = "pipeline"
        self.problems: list[Problem] = []
        self.asks: dict[str, Resources] = {}
        self._references: dict[str, dict[str, Reference]] = {}
        self._edges: dict[str, Mapping[str, Edge]] = {}
        self._makes: dict[str, type[Artifact]] = {}
        self._followed: dict[str, Reference | None] = {}  # what a step makes the same kind of
        given, written = self._sections(raw)
        self._known = None if self._lost(raw) else (*given, *written)
        self.names = tuple(written)
        self.inputs = {k: a for k, v in given.items() if (a := self._input(k, v)) is not None}
        self.steps = {k: s for k, v in written.items() if (s := self._step(k, v)) is not None}
        self._graph(given.keys() & written.keys())

    @property
    def taken(self) -> frozenset[str]:
        """See the class."""
        return frozenset(n for inputs in self._references.values() for r in inputs.values() for n in names_in(r))

    def _refuse(self, path: Part, sentence: str) -> None:
        self.problems.append(Problem(path, sentence))

    def _sections(self, raw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if raw is None or raw == {}:
            self._refuse((), "empty, expected a pipeline. Write 'steps:' and the steps below it.")
            return {}, {}
        if not isinstance(raw, dict):
            self._refuse((), f"{shown(raw)}, expected a mapping. Write 'steps:' and the steps below it.")
            return {}, {}
        for key in (k for k in raw if k not in TOP):
            self._refuse((key,), f"unknown key {key!r}, expected one of {', '.join(TOP)}. {near(key, TOP)}")
        name = raw.get("name", self.name)
        if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            self.name = name
        else:
            allowed = "letters, digits, '.', '_' and '-', at most 100, a letter or a digit first"
            self._refuse(("name",), f"name: {shown(name)}, expected {allowed}.")
        self.problems += uses_of(raw)[1]
        for key in ("inputs", "steps"):
            if raw.get(key) is not None and not isinstance(raw[key], dict):
                self._refuse((key,), f"{key}: {shown(raw[key])}, expected a mapping. Write each as NAME: and its keys.")
        if not raw.get("steps"):
            self._refuse((), "no steps, expected at least one. Write it below 'steps:'.")
        given, written = (raw[key] if isinstance(raw.get(key), dict) else {} for key in ("inputs", "steps"))
        return given, written

    def _lost(self, raw: Any) -> bool:
        """Whether a section is unreadable that would have had names."""
        sections = [raw.get(k) for k in ("inputs", "steps")] if isinstance(raw, dict) else []
        return any(s is not None and not isinstance(s, dict) for s in sections)

    def _input(self, name: str, raw: Any) -> Artifact | None:
        path = ("inputs", name)
        if not re.fullmatch(NAME, name):
            self._refuse(path, f"the name {name!r}, expected {NAMES}.")
        if not isinstance(raw, dict) or len(raw) != 1:
            self._refuse(path, f"{shown(raw)}, expected one pair such as {{model: URI}}.")
            return None
        ((kind, uri),) = raw.items()
        if kind not in KINDS:
            self._refuse((*path, kind), f"the kind {kind!r}, expected one of {', '.join(KINDS)}. {near(kind, KINDS)}")
            return None
        if not isinstance(uri, str) or not uri.strip():
            self._refuse((*path, kind), f"{kind}: {shown(uri)}, expected a path or a URI as text.")
            return None
        return KINDS[kind](uri)

    def _step(self, name: str, raw: Any) -> StepSpec | None:
        path = ("steps", name)
        before = len(self.problems)
        if not re.fullmatch(NAME, name):
            self._refuse(path, f"the name {name!r}, expected {NAMES}.")
        if not isinstance(raw, dict):
            self._refuse(path, f"{shown(raw)}, expected {', '.join(STEP)}. Write them below the name.")
            return None
        verb = self._operator(path, raw)
        for key in (k for k in raw if k not in STEP):
            self._stray((*path, key), key, verb, raw, f"unknown key {key!r}. {near(key, STEP)}")
        if verb is None:
            return None
        inputs = self._inputs((*path, "inputs"), raw, verb)
        method = self._method((*path, "method"), raw.get("method"), verb)
        params = self._params((*path, "params"), raw, verb)
        resources = self._resources((*path, "resources"), raw.get("resources"), verb)
        self._references[name], self._edges[name] = inputs, verb.edges
        if resources is not None:
            self.asks[name] = resources
        if verb.follows:
            self._followed[name] = inputs.get(verb.follows)
        elif method is not None or len(verb.gives) == 1:
            self._makes[name] = verb.makes(method, params)
        if resources is None or len(self.problems) > before:
            return None
        return StepSpec(operator=verb.name, inputs=inputs, method=method, params=params, resources=resources)

    def _operator(self, path: Part, raw: Mapping[str, Any]) -> Operator[Any] | None:
        verb = raw.get("operator")
        path = (*path, "operator")
        if not isinstance(verb, str):
            came = "no operator" if verb is None else f"operator: {shown(verb)}"
            self._refuse(path, f"{came}, expected one of {', '.join(self.catalog.verbs())}.")
            return None
        try:
            return self.catalog.operator(verb)
        except UnknownName as error:
            self._unknown(path, error)
            return None

    def _unknown(self, path: Part, error: UnknownName) -> None:
        """Refuse a name, unless files that could not be read may define it and nothing that is known is near it."""
        sentence = str(error)
        if not self.partial or "Did you mean" in sentence:
            self._refuse(path, sentence)

    def _stray(self, path: Part, key: str, verb: Operator[Any] | None, step: Mapping[str, Any], otherwise: str) -> None:
        """Refuse a key, and say where it belongs if it belongs into another section of the step."""
        homes: dict[str, Collection[str]] = {}
        if verb is not None:
            try:
                fields = method_fields(verb, step, self.catalog)
            except LfmError:
                fields = ()  # which is a problem of its own
            homes = {"inputs": verb.edges, "params": verb.params, "method": fields,
                     "resources": Resources.__dataclass_fields__}  # fmt: skip
        home = next((section for section, known in homes.items() if key in known), "")
        self._refuse(
            path,
            f"{key!r} stands in the wrong place, expected it below '{home}:'. Move it there." if home else otherwise,
        )

    def _mapping(self, path: Part, raw: Mapping[str, Any]) -> dict[str, Any] | None:
        """A section of a step; None where it is no mapping."""
        value = raw.get(path[-1])
        if value is None or isinstance(value, dict):
            return value or {}
        self._refuse(path, f"{path[-1]}: {shown(value)}, expected a mapping. Write it as {path[-1]}: {{name: value}}.")
        return None

    def _inputs(self, path: Part, raw: Mapping[str, Any], verb: Operator[Any]) -> dict[str, Reference]:
        found: dict[str, Reference] = {}
        given = self._mapping(path, raw)
        if given is None:
            return found
        for key, value in given.items():
            edge = verb.edges.get(key)
            if edge is None:
                otherwise = f"{verb.name!r} has no input {key!r}. {near(key, verb.edges)}"
                self._stray((*path, key), key, verb, raw, otherwise)
            elif value is not None or edge.required:
                reference = self._reference((*path, key), key, value, edge)
                if reference is not None:
                    found[key] = reference
        for key, edge in verb.edges.items():
            if edge.required and key not in given:
                self._refuse(path, f"{verb.name!r} needs the input {key!r}. Write it below 'inputs:'.")
        return found

    def _reference(self, path: Part, key: str, value: Any, edge: Edge) -> Reference | None:
        if isinstance(value, Stray):
            fix = "Make it the default of one of the function's parameters."
            self._refuse(path, f"{key}={value!r}, expected a step or an input of the pipeline. {fix}")
            return None
        reference: Reference | None = None
        if isinstance(value, str):
            forms: dict[str, Reference] = {"one": value, "sequence": (value,), "mapping": {value: value}}
            reference = forms[edge.many]
        elif edge.many != "one" and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            reference = {n: n for n in value} if edge.many == "mapping" else tuple(value)
        elif edge.many == "mapping" and isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
            reference = value
        if reference is None:
            wanted = "the name of an input or a step" if edge.many == "one" else "names of inputs or steps"
            stray = next((v for v in _inside(value) if isinstance(v, Stray)), None)
            self._refuse(path, f"{key}={shown(value if stray is None else stray)}, expected {wanted}.")
            return None
        for name in names_in(reference):
            if self._known is not None and name not in self._known:
                self._refuse(path, f"no input or step is called {name!r}. {near(name, {*self._known} - {path[1]})}")
        return reference

    def _method(self, path: Part, raw: Any, verb: Operator[Any]) -> Method | None:
        if verb.family is None:
            if raw is not None:
                self._refuse(path, f"{verb.name!r} takes no method, expected none. Take it out.")
            return None
        if raw is None and not verb.needs_method:
            return None
        if isinstance(raw, type):
            self._refuse(path, f"method: the class {raw.__name__}, expected one made of it. Write {raw.__name__}().")
            return None
        name = raw.get("name") if isinstance(raw, dict) else None
        if not isinstance(name, str):
            known = self.catalog.methods(verb.family)
            came = "no method" if raw is None else f"method: {shown(raw)}"
            self._refuse(path, f"{came}, expected {{name: ...}} with one of {', '.join(known)}.")
            return None
        try:
            cls = self.catalog.method(verb.family, name)
        except UnknownName as error:
            self._unknown((*path, "name"), error)
            return None
        unfinished = _unfinished(cls)
        if unfinished:
            self._refuse((*path, "name"), unfinished)
            return None
        fields = {k: v for k, v in raw.items() if k != "name"}
        found: Method | None = self._made(path, cls, fields, cls.__name__)
        return found

    def _params(self, path: Part, raw: Mapping[str, Any], verb: Operator[Any]) -> dict[str, object]:
        given = self._mapping(path, raw)
        if given is None:
            return {}
        for key in (k for k in given if k not in verb.params):
            self._stray(
                (*path, key), key, verb, raw, f"{verb.name!r} has no parameter {key!r}. {near(key, verb.params)}"
            )
        try:
            with own(self.code):
                found, wrong = parameters_of(verb, {k: v for k, v in given.items() if k in verb.params})
        except OwnCodeFailed as error:
            found, wrong = {}, [((), str(error))]
        for below, sentence in wrong:
            self._refuse((*path, *below), sentence)
        return found

    def _resources(self, path: Part, raw: Any, verb: Operator[Any]) -> Resources | None:
        if raw is None:
            return verb.resources
        if not isinstance(raw, dict):
            self._refuse(path, f"resources: {shown(raw)}, expected a mapping. Write it as resources: {{name: value}}.")
            return None
        asked = {**RESOURCES.dump_python(verb.resources), **raw}
        found: Resources | None = self._made(path, Resources, asked, "resources")
        return found

    def _made(self, path: Part, cls: type[Any], fields: Mapping[str, Any], what: str) -> Any:
        try:
            with own(self.code):
                made, wrong = object_of(cls, fields, what)
        except OwnCodeFailed as error:
            made, wrong = None, [((), str(error))]
        for below, sentence in wrong:
            self._refuse((*path, *below), sentence)
        return made

    def _graph(self, ambiguous: Collection[str]) -> None:
        """Check which kinds of artifacts meet, and that the steps have an order."""
        for both in sorted(ambiguous):
            self._refuse(("steps", both), "an input has this name too, expected one for each. Rename one of them.")
        makes = {**self._makes, **{k: type(a) for k, a in self.inputs.items()}}
        for _ in self._followed:  # each may follow another
            makes |= {n: makes[s] for n, s in self._followed.items() if isinstance(s, str) and s in makes}
        for name, inputs in self._references.items():
            for key, reference in inputs.items():
                kinds = self._edges[name][key].kinds
                for source in names_in(reference):
                    if source in makes and source not in ambiguous and makes[source] not in kinds:
                        wanted = " or ".join(map(kind_of, kinds))
                        sentence = f"{key}={source!r} is a {kind_of(makes[source])}, expected a {wanted}."
                        self._refuse(("steps", name, "inputs", key), sentence)
        graph = {
            n: {s for r in inputs.values() for s in names_in(r) if s in self._references and s not in ambiguous}
            for n, inputs in self._references.items()
            if n not in ambiguous
        }
        while (cycle := _cycle(graph)) is not None:
            sentence = f"the steps form a cycle: {' -> '.join(cycle)}, expected an order. Take one of these inputs out."
            self._refuse(("steps", min(cycle, key=self.names.index)), sentence)
            graph = {n: needs - set(cycle) for n, needs in graph.items() if n not in cycle}


def _unfinished(method: type[Method]) -> str:
    """What a class lacks to be a method; nothing where it is whole."""
    lacks = sorted(getattr(method, "__abstractmethods__", ()))
    if lacks:
        return f"{method.__name__} has no {' and no '.join(lacks)}, which its family asks for. Define it."
    if not is_dataclass(method):
        fix = "Write @dataclass(frozen=True, kw_only=True, slots=True) above it."
        return f"{method.__name__} is a plain class, expected a dataclass. {fix}"
    return ""


def _cycle(graph: Mapping[str, Collection[str]]) -> Sequence[str] | None:
    """Names that lead from a step back to it, if there are any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return None


def _inside(value: Any) -> Collection[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
