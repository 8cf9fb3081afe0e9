"""What rules say of a document, and how they look into it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Document = Mapping[str, Any]
Said = Iterator[tuple[str, str]]
"""Where, and a sentence about it."""
Rules = Mapping[str, Callable[..., Said]]
"""Rules by name."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a document.

    Attributes:
        rule: Which rule it breaks.
        where: The part, as ``spec.headGroupSpec.labels``.
        sentence: What is there, and what would be right.
    """

    rule: str
    where: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.where}: {self.sentence}"


def at(value: Any, path: str, otherwise: Any = None) -> Any:
    """What lies at a dotted path of mappings; `otherwise` where nothing does."""
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return otherwise
        value = value[key]
    return value


def strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every text in a document, with its place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from strings(below, f"{where}.{key}")
    elif isinstance(value, Sequence):
        for number, below in enumerate(value):
            yield from strings(below, f"{where}.{number}")


def whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
