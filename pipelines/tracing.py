"""Python steps -> plain values, the same as a YAML text gives, and the places of the calls that made them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pydantic import TypeAdapter

from lfm.method import Method
from operators.artifact import Artifact, kind_of
from operators.base import Resources, Step
from operators.catalog import method_name
from operators.code import Code, own
from pipelines.problems import Place, Places, Problem, shown

RESOURCES = TypeAdapter(Resources)  # made once: making one takes a millisecond


@dataclass(frozen=True, slots=True)
class Stray:
    """What stands where a step or an input of the pipeline has to, and is neither."""

    value: object

    def __repr__(self) -> str:
        if isinstance(self.value, Artifact):
            return f"{type(self.value).__name__}({self.value.uri!r})"
        return shown(self.value)


class Trace:
    """A pipeline as its function makes it.

    Attributes:
        raw: As plain values; None where nothing came of it.
        places: Where its steps and inputs are.
        problems: What is wrong with the function and what it returns.
    """

    def __init__(self, pipeline: Callable[..., Any], code: Code) -> None:
        """Call a pipeline's function with its inputs.

        Raises:
            OwnCodeFailed: It raised.
        """
        self.raw: dict[str, Any] | None = None
        self.problems: list[Problem] = []
        self.places = Places(pipeline.__name__)
        written = getattr(pipeline, "__code__", None)
        if written is not None:
            self._note((), written.co_filename, written.co_firstlineno)
        inputs = {k: p.default for k, p in inspect.signature(pipeline).parameters.items()}
        for name, value in inputs.items():
            if not isinstance(value, Artifact):
                example = "expected one such as Model('hf://...'). Give every input one."
                came = "no default" if value is inspect.Parameter.empty else f"the default {shown(value)}"
                self.problems.append(Problem(("inputs", name), f"{came}, {example}"))
        if self.problems:
            return
        with own(code):
            last = pipeline(**inputs)
        self._inputs = {id(a): k for k, a in inputs.items()}
        self._seen: dict[str, Step[Any]] = {}
        self._steps: dict[str, Any] = {}
        for step in last if isinstance(last, tuple | list) else (last,):
            if isinstance(step, Step):
                self._source(step)
            else:
                self.problems.append(Problem((), f"returns {Stray(step)}, expected its last step. Return that."))
        self.raw = {
            "name": pipeline.__name__.replace("_", "-").strip("-"),
            "inputs": {k: {kind_of(type(a)): a.uri} for k, a in inputs.items()},
            "steps": self._steps,
        }

    def _note(self, path: tuple[str, ...], file: str, line: int) -> None:
        name = PurePath(file).name if PurePath(file).is_absolute() else file
        self.places.known[path] = Place(f"{name}:{line}", line)

    def _source(self, source: Any) -> Any:
        """The name of a step or an input, after writing down every step that it needs."""
        if isinstance(source, tuple | list):
            return [self._source(s) for s in source]
        if isinstance(source, Mapping):
            return {k: self._source(s) for k, s in source.items()}
        if not isinstance(source, Step):
            return None if source is None else self._inputs.get(id(source), Stray(source))
        name = str(source.name)
        known = self._seen.get(name)
        if known is None:
            self._seen[name] = source
            self._step(name, source)
        elif known != source:
            path = ("steps", name)
            again = f"another step has this name, in {self.places.of(path).text}, expected one. Rename one of them."
            beside = (*path, f"again in {source.at[1]}")
            self._note(beside, *source.at)
            self.problems.append(Problem(beside, again))
        return name

    def _step(self, name: str, step: Step[Any]) -> None:
        inputs = {k: self._source(v) for k, v in step.inputs.items()}
        method: Any = step.method
        if isinstance(method, Method):
            method = {"name": method_name(type(method)), **method.hyperparameters()}
        asks = step.resources
        self._steps[name] = {
            "operator": step.operator.name,
            "inputs": inputs,
            **({} if method is None else {"method": method}),
            "params": dict(step.params),
            "resources": RESOURCES.dump_python(asks) if isinstance(asks, Resources) else asks,
        }
        self._note(("steps", name), *step.at)
