"""How an operator is declared: the signature is the interface.

    @operator(resources=Resources(cpus_per_worker=4))
    def merge(work: Workspace, *, base: Model, experts: Sequence[Model], method: Merge) -> Model: ...

Parameters annotated with an `Artifact` are inputs (edges of the graph), `method` is the method
and its annotation the family it must belong to, everything else is a plain parameter.
Calling an operator runs nothing. It returns a `Step`, which a pipeline can plan.
"""

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args, get_origin

from lfm.errors import HyperparameterError, LfmError
from lfm.method import FIELDS, Method
from operators.artifact import KINDS, Artifact, kind_of
from operators.footprint import Footprint
from operators.resources import Resources as Resources
from operators.workspace import Workspace

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T", bound=Artifact)


Problems = Callable[..., Iterable[str]]
Kind = Callable[[Mapping[str, object]], type[Artifact]]


class Settings:
    """Base of a frozen dataclass whose fields are parameters that several operators share.

    An operator that has a parameter of such a type has its fields as parameters; its body gets them as one object.
    """

    __slots__ = ()
    __pydantic_config__ = FIELDS  # a dataclass would take an annotation for a field
    noise: ClassVar[frozenset[str]] = frozenset()
    """Fields that change nothing but floating-point noise: no part of a fingerprint."""
    adjustable: ClassVar[frozenset[str]] = frozenset()
    """Fields that may change in the middle of what they set."""

    def require(self, holds: bool, field: str, allowed: str) -> None:
        """Raise `HyperparameterError` unless `holds`."""
        if not holds:
            raise HyperparameterError(type(self).__name__.lower(), field, getattr(self, field), allowed)


class DeclarationError(LfmError, TypeError):
    """An operator whose signature says something that a pipeline cannot mean."""

    def __init__(self, operator: str, what: str, allowed: str) -> None:
        super().__init__(operator, what, allowed)
        self.operator, self.what, self.allowed = operator, what, allowed

    def __str__(self) -> str:
        return f"Operator {self.operator!r}: {self.what}, expected {self.allowed}."


@dataclass(frozen=True, slots=True)
class Edge:
    """One artifact parameter of an operator: which kinds it takes, and in what shape."""

    kinds: tuple[type[Artifact], ...]
    many: str  # "one", "sequence" or "mapping": a mapping's keys are the names of what it holds
    required: bool


@dataclass(frozen=True)
class Parameter:
    """One plain parameter of an operator."""

    hint: Any
    default: Any

    @functools.cached_property
    def adapter(self) -> "TypeAdapter[Any]":
        """What reads a value of it; made once: making one takes a millisecond."""
        from pydantic import TypeAdapter  # here, so that a body runs where nothing of a pipeline is installed

        return TypeAdapter(self.hint)

    @property
    def required(self) -> bool:
        """Whether a step has to give it."""
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True, kw_only=True, slots=True)
class Step(Generic[T]):
    """One call of one operator, not made yet.

    Attributes:
        at: The file and line of the call, for messages.
    """

    name: str
    operator: "Operator[T]"
    inputs: Mapping[str, Any]
    method: Method | None
    params: Mapping[str, object]
    resources: Resources
    at: tuple[str, int] = field(default=("", 0), compare=False)


@dataclass(frozen=True, eq=False)
class Operator(Generic[T]):
    """A verb: what it takes, what it gives, and the body that does it.

    Attributes:
        effect: True where the result is a change of the world (an endpoint, a registered name): never a
            cache hit, done again by each run.
        starts_workers: True where Ray processes that it starts do the work: they ask for its resources then, and its
            own task asks for none.
        shares_work: True where several workers may do its work, which its own process does alone where there is one.
        kind: Where several kinds may be made and the method does not decide which, says it of a step's parameters.
        problems: Says before anything runs what headers alone tell is wrong, a clause each. It is called with what
            the body will be called with, but without ``work``; an artifact that another step makes, or of which
            nothing is known here, is None, and of one that lies elsewhere the path leads to headers without values.
            Besides it gets the step's ``resources``, and as ``kinds`` the kinds of what each given artifact
            parameter will hold, in order, whoever makes it; `Artifact` where nobody knows.
        takes_ensembles: The inputs that may be a model that is made of several; a plan refuses one as any other.
        makes_ensembles: True where its result is such a model.
        hands_on: The input that its result is, unchanged; empty for most.
        footprint: Says what the step takes, called as `problems` is; None where that is not known. A model that
            another step makes is one whose config says what that will be, and whose weights are not there.
        like: The input that is a model of the same shape as what it makes; empty where there is none.
        config: Says the config of the model that it makes, where no input is like it; called as `problems` is.
        follows: The input of whose kind its result is; empty where signature, method or `kind` say that.
        repeats: The inputs that have to be steps, which it runs again, with all that they need, with other values.
    """

    body: Callable[..., T]
    resources: Resources
    effect: bool = False
    starts_workers: bool = False
    shares_work: bool = False
    kind: Kind | None = None
    problems: Problems | None = None
    takes_ensembles: tuple[str, ...] = ()
    makes_ensembles: bool = False
    hands_on: str = ""
    footprint: Callable[..., Footprint | None] | None = None
    like: str = ""
    config: Callable[..., Mapping[str, Any] | None] | None = None
    follows: str = ""
    repeats: tuple[str, ...] = ()
    name: str = field(init=False)
    gives: tuple[type[Artifact], ...] = field(init=False)
    family: type[Method] | None = field(init=False)
    needs_method: bool = field(init=False)
    edges: Mapping[str, Edge] = field(init=False)
    params: Mapping[str, Parameter] = field(init=False)
    bundles: Mapping[str, type[Settings]] = field(init=False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(self.body, include_extras=True)
        given = hints.pop("return", None)
        family = _family(hints.pop("method", None))
        name = self.body.__name__
        gives = _edge(given, required=True)
        if gives is None or gives.many != "one":
            raise DeclarationError(name, f"returns {given!r}", "an Artifact type as return annotation")
        if hints.pop("work", None) is not Workspace:
            raise DeclarationError(name, "has no parameter 'work: Workspace'", "it first, then keywords")
        if family is not None and not (isinstance(family, type) and issubclass(family, Method)):
            raise DeclarationError(name, f"method: {family!r}", "a family of lfm.<family>.base")
        signature = inspect.signature(self.body).parameters
        unhinted = [k for k in signature if k not in {*hints, "work", "method"}]
        if unhinted:
            raise DeclarationError(name, f"{unhinted[0]!r} has no annotation", "one for every parameter")
        edges: dict[str, Edge] = {}
        params: dict[str, Parameter] = {}
        bundles: dict[str, type[Settings]] = {}
        for key, hint in hints.items():
            default = signature[key].default
            edge = _edge(hint, required=default is inspect.Parameter.empty)
            if edge is not None:
                edges[key] = edge
            elif isinstance(hint, type) and issubclass(hint, Settings):
                bundles[key] = hint
                params |= _fields(hint)
            else:
                params[key] = Parameter(hint, default)
        needs_method = family is not None and signature["method"].default is inspect.Parameter.empty
        for key, value in (
            ("name", name),
            ("gives", gives.kinds),
            ("family", family),
            ("needs_method", needs_method),
            ("edges", edges),
            ("params", params),
            ("bundles", bundles),
        ):
            object.__setattr__(self, key, value)

    @property
    def module(self) -> str:
        """The module that defines it."""
        return self.body.__module__

    def arguments(self, params: Mapping[str, object]) -> dict[str, Any]:
        """What the body takes for a step's parameters: single ones as they are, those of settings as one object."""
        bundled = {f.name: name for name, cls in self.bundles.items() for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        plain: dict[str, Any] = {k: v for k, v in params.items() if k not in bundled}
        for name, settings in self.bundles.items():
            plain[name] = settings(**{k: v for k, v in params.items() if bundled.get(k) == name})
        return plain

    def validated(self, params: Mapping[str, object]) -> dict[str, Any]:
        """The same as `arguments`, for parameters that are plain values as a file or a journal has them."""
        return self.arguments({k: self.params[k].adapter.validate_python(v) for k, v in params.items()})

    def decisive(self, params: Mapping[str, object]) -> dict[str, object]:
        """The parameters that decide the result."""
        noise = {name for cls in self.bundles.values() for name in cls.noise}
        return {k: v for k, v in params.items() if k not in noise}

    def adjustable(self, method: Method | None) -> frozenset[str]:
        """The fields of a step, its method's among them, that may change in its middle; none where nothing may."""
        own = frozenset(name for cls in self.bundles.values() for name in cls.adjustable)
        return own | method.adjustable if own and method is not None else own

    def makes(self, method: Method | None, params: Mapping[str, object]) -> type[Artifact]:
        """What a step makes: where the signature leaves a choice, `kind` or else the method's class decides."""
        if len(self.gives) == 1:
            return self.gives[0]
        if self.kind is not None:
            return self.kind(params)
        return KINDS[getattr(method, "gives", kind_of(self.gives[0]))]

    def __call__(
        self,
        name: str,
        /,
        *,
        method: Method | None = None,
        resources: Resources | None = None,
        **arguments: Any,
    ) -> Step[T]:
        """One step of a pipeline; runs nothing."""
        inputs = {k: arguments.pop(k) for k in list(arguments) if k in self.edges}
        caller = sys._getframe(1)
        return Step(
            name=name,
            operator=self,
            inputs={k: tuple(v) if isinstance(v, list) else v for k, v in inputs.items()},
            method=method,
            params=arguments,
            resources=resources or self.resources,
            at=(caller.f_code.co_filename, caller.f_lineno),
        )


def _fields(settings: type[Settings]) -> dict[str, Parameter]:
    """A dataclass's fields as parameters."""
    hints = typing.get_type_hints(settings)
    missing = inspect.Parameter.empty
    return {
        f.name: Parameter(hints[f.name], missing if f.default is dataclasses.MISSING else f.default)
        for f in dataclasses.fields(settings)  # type: ignore[arg-type]
    }


def _family(hint: Any) -> Any:
    """The family that `method` is annotated with, of which ``None`` says only that it may be left out."""
    if get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    said = [one for one in get_args(hint) if one is not type(None)]
    return said[0] if len(said) == 1 else hint


def _edge(hint: Any, *, required: bool) -> Edge | None:
    """The edge that an annotation declares, or None for one that names no artifact."""
    many = "one"
    if get_origin(hint) is Sequence:
        many, (hint,) = "sequence", get_args(hint)
    elif get_origin(hint) is Mapping:
        many, (_, hint) = "mapping", get_args(hint)
    union = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kinds = tuple(k for k in union if isinstance(k, type) and issubclass(k, Artifact))
    return Edge(kinds, many, required) if kinds else None


def operator(
    *,
    resources: Resources | None = None,
    effect: bool = False,
    starts_workers: bool = False,
    shares_work: bool = False,
    kind: Kind | None = None,
    problems: Problems | None = None,
    takes_ensembles: tuple[str, ...] = (),
    makes_ensembles: bool = False,
    hands_on: str = "",
    footprint: Callable[..., Footprint | None] | None = None,
    like: str = "",
    config: Callable[..., Mapping[str, Any] | None] | None = None,
    follows: str = "",
    repeats: tuple[str, ...] = (),
) -> Callable[[Callable[..., T]], Operator[T]]:
    """Turn a function into an `Operator`, whose attributes say what each of these means."""
    return lambda body: Operator(
        body,
        resources or Resources(),
        effect,
        starts_workers,
        shares_work,
        kind,
        problems,
        takes_ensembles,
        makes_ensembles,
        hands_on,
        footprint,
        like,
        config,
        follows,
        repeats,
    )
