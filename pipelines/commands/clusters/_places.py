"""What the actions of `lfm cluster` share: who is asked, what is seen, and what they refuse."""

import os
import sys

from cluster import launched
from cluster.machines import located
from cluster.profile import CLOUDS, Profile
from cluster.seen import Seen, look
from cluster.tokens import authenticated
from lfm.errors import LfmError
from pipelines.profiles import records


class WrongPlace(LfmError, ValueError):
    """An action that is not for clusters of the profile's place."""

    def __init__(self, action: str, place: str, fix: str) -> None:
        super().__init__(action, place, fix)
        self.action, self.place, self.fix = action, place, fix

    def __str__(self) -> str:
        return f"lfm cluster {self.action}: the profile's place is {self.place!r}, expected another one. {self.fix}"


class NobodyToAsk(LfmError, RuntimeError):
    """A question without a terminal."""

    def __init__(self, question: str) -> None:
        super().__init__(question)
        self.question = question

    def __str__(self) -> str:
        return f"{self.question}: there is no terminal to ask at, expected --yes. Say it if you mean it."


def confirmed(question: str) -> bool:
    """Whether somebody says yes.

    Raises:
        NobodyToAsk: Nobody is there.
    """
    if not sys.stdin.isatty():
        raise NobodyToAsk(question)
    return input(f"{question}? [y/N] ").strip().lower() in ("y", "yes")


def looked(profile: Profile) -> tuple[Profile, Seen]:
    """What is seen of a cluster, and its profile with where that is."""
    if profile.place in CLOUDS:
        return profile, launched.looked(profile)
    there = located(profile, records())
    return there, look(there.address, authenticated(os.environ, there.token))
