"""How a trial of a population came to be: the values that it began with, and those that came later. Pure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from operators.searches.space import Population

CHANGES, REST = "midway", "rest_at"
"""The parameters of every step that trains which say what changes on the way, and where it rests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """The values of a trial from its first step on; what it took over from another one is that one's.

    Attributes:
        start: The values that it began with, by ``STEP.FIELD``.
        at: After how many steps it rests now; 0 before the first.
        later: After how many steps which values became others.
    """

    start: Mapping[str, Any]
    at: int = 0
    later: tuple[tuple[int, Mapping[str, Any]], ...] = ()

    @property
    def now(self) -> dict[str, Any]:
        """The values that hold now."""
        found = dict(self.start)
        for _, values in self.later:
            found |= values
        return found

    def on(self, values: Mapping[str, Any]) -> "Lineage":
        """The same, going on from where it rests with these values; that nothing changes is noted too.

        So each part of a training between two rests is a step of its own to the store: its checkpoint is not dropped
        while another trial may still begin there.
        """
        now = self.now
        changed = {k: v for k, v in values.items() if v != now[k]}
        return replace(self, later=(*self.later, (self.at, changed)))

    def changes(self, population: Population, rest: int | None) -> dict[str, Any]:
        """What a run of the trial up to its next rest, or to its end, changes of the pipeline."""
        fields = [{"at": at, "values": {_field(k): v for k, v in values.items()}} for at, values in self.later]
        midway = {f"{population.step}.{CHANGES}": fields} if fields else {}
        return {**self.start, **midway, **({} if rest is None else {f"{population.step}.{REST}": rest})}

    def next_rest(self, population: Population) -> int | None:
        """After how many steps it rests next; None where it goes on to its end."""
        then = self.at + population.every
        return then if then <= population.last else None

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "Lineage":
        """The opposite of `text`."""
        raw = json.loads(text)
        return cls(start=raw["start"], at=raw["at"], later=tuple((at, values) for at, values in raw["later"]))


def _field(key: str) -> str:
    """A field's name alone, without its step and the part of it that has it."""
    return key.rpartition(".")[2]


def resting(changes: Mapping[str, Any], population: Population | None) -> bool:
    """Whether a run with these changes is a trial on its way."""
    return population is not None and f"{population.step}.{REST}" in changes
