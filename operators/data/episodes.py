"""Labels -> episodes: which examples a model learns a task from, and which it is asked then."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from operators.base import Settings
from operators.data.row_files import DatasetError

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShot(Settings):
    """What an episode is made of.

    Attributes:
        ways: Labels that are told apart; of a decoder's texts one, as their label is the task.
        shots: Examples of each label that the model learns from.
        queries: Examples of each label that it is asked then.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 15

    def __post_init__(self) -> None:
        self.require(self.ways >= 1, "ways", "ways >= 1")
        self.require(self.shots >= 1, "shots", "shots >= 1")
        self.require(self.queries >= 1, "queries", "queries >= 1")


@dataclass(frozen=True, slots=True)
class Drawn:
    """The examples of one episode, by their numbers; the place of a row of these is the number of its class.

    Attributes:
        support: Of shape (ways, shots).
        query: Of shape (ways, queries); none of these is in the support.
    """

    support: Numbers
    query: Numbers


class Deck:
    """A data set's examples by label, from which episodes are drawn.

    What is drawn depends on the words of the seed alone, not on who draws or on what was drawn before.
    """

    def __init__(self, labels: Sequence[str], few_shot: FewShot, where: str) -> None:
        """Sort the examples.

        Args:
            labels: Of each example.
            few_shot: What an episode is made of.
            where: The data set, for messages.

        Raises:
            DatasetError: There are fewer labels than ways, or one has too few examples for an episode.
        """
        self.few_shot = few_shot
        rows: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
        for number, label in enumerate(labels):
            rows[label].append(number)
        if len(rows) < few_shot.ways:
            what = f"has {len(rows)} labels, expected at least ways={few_shot.ways}"
            raise DatasetError(where, what, "Give rows of more labels, or lower it.")
        needed = few_shot.shots + few_shot.queries
        for label, own in rows.items():
            if len(own) < needed:
                what = f"has {len(own)} rows of the label {label!r}, expected at least shots + queries = {needed}"
                raise DatasetError(where, what, "Lower these, or leave the label out.")
        self.rows = [np.array(own) for own in rows.values()]

    def draw(self, *seed: int) -> Drawn:
        """One episode: labels in an order that is drawn too, so that their numbers say nothing of what they are."""
        draw = np.random.default_rng(seed)
        shots, needed = self.few_shot.shots, self.few_shot.shots + self.few_shot.queries
        chosen = draw.choice(len(self.rows), self.few_shot.ways, replace=False)
        taken = np.stack([draw.choice(self.rows[label], needed, replace=False) for label in chosen])
        return Drawn(taken[:, :shots], taken[:, shots:])
