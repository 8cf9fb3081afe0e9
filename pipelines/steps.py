"""One step as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lfm.method import Method
from operators.base import Operator, Resources
from operators.catalog import Catalog

Reference = str | tuple[str, ...] | Mapping[str, str]
"""What fills an edge: the name of an input or step, several, or several with names of their own."""


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


def names_in(reference: Reference) -> tuple[str, ...]:
    """The names that a reference holds, in order."""
    if isinstance(reference, str):
        return (reference,)
    return tuple(reference.values()) if isinstance(reference, Mapping) else tuple(reference)


def method_fields(verb: Operator[Any], step: Mapping[str, Any], catalog: Catalog) -> tuple[str, ...]:
    """The fields of the method that a step names, as plain values; none where it names none.

    Raises:
        UnknownName: There is no such method.
    """
    method = step.get("method")
    if verb.family is None or not isinstance(method, dict) or "name" not in method:
        return ()
    return tuple(getattr(catalog.method(verb.family, str(method["name"])), "__dataclass_fields__", ()))
