"""What is wrong with a pipeline, part by part, and where each part is written."""

import difflib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from lfm.errors import LfmError
from pipelines.credentials import masked

Part = tuple[str, ...]
"""A part of a pipeline: the keys that lead to it, such as ``("steps", "merged", "params", "dtype")``."""

NOUNS = {"steps": "step", "inputs": "input"}
WRITES = reprlib.Repr()
WRITES.maxstring = WRITES.maxother = 120
WRITES.maxlist = WRITES.maxdict = 6


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: The part it is wrong with, or an option of the command line such as ``--until``.
        sentence: What is wrong, and what would be right; of an option with its name.
    """

    path: Part
    sentence: str

    @property
    def option(self) -> bool:
        """Whether it is the command line that is wrong; its sentence says which part of it."""
        return bool(self.path) and self.path[0].startswith("--")

    def __str__(self) -> str:
        return self.at("")

    def at(self, place: str) -> str:
        """What it says, with the place where the part is written."""
        if self.option:
            return self.sentence
        about = f"{NOUNS[self.path[0]]} {self.path[1]!r}" if len(self.path) > 1 and self.path[0] in NOUNS else ""
        where = " ".join(filter(None, (place, about)))
        return f"{where}: {self.sentence}" if where else self.sentence


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is written; of two, the one with the lower number comes first."""

    text: str
    number: int = 0


@dataclass(slots=True)
class Places:
    """Where the parts of one pipeline are written.

    Attributes:
        source: What messages call the whole.
        known: The place of a part, and of all below it that have none of their own.
    """

    source: str
    known: dict[Part, Place] = field(default_factory=dict)

    def of(self, path: Part) -> Place:
        """The place of a part."""
        while path and path not in self.known:
            path = path[:-1]
        return self.known.get(path, Place(self.source))

    def sentences(self, problems: Iterable[Problem]) -> tuple[str, ...]:
        """Every problem once, with its place, in the order in which the parts are written; options come first."""
        places = {problem: self.of(problem.path) for problem in problems}
        ordered = sorted(places, key=lambda p: 0 if p.option else places[p].number)
        # A place may be words of the command line, which a log keeps.
        return tuple(dict.fromkeys(masked(problem.at(places[problem].text)) for problem in ordered))


class SpecError(LfmError, ValueError):
    """A pipeline that cannot mean anything: every problem found, each a sentence that starts with where."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


def near(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: what was probably meant, or all there is."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=3)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    return f"Known: {', '.join(known) or 'none'}."


def unknown_step(option: str, name: str, known: Iterable[str]) -> Problem:
    """What is wrong with an option of the command line that names a step which there is not."""
    return Problem((option,), f"{option}: no step is called {name!r}. {near(name, known)}")


def shown(value: object) -> str:
    """A value as a message quotes it, cut short where it is long."""
    return WRITES.repr(value)
