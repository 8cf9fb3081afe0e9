"""The folder of a model that is made of several: which files it has, told without loading any."""

import re
from collections.abc import Iterable
from pathlib import Path

from lfm.errors import LfmError
from operators.models.description import described

MEMBERS = "members"
"""Holds a whole model's folder for each model that answers, ``0`` and so on; of a network that was built of several
one, with all of it that is no expert's. No weights lie beside it, so that nobody loads the folder as one of them."""
KEY = "rewrites"
"""What `lfm.json` has where methods of this project make the model of what lies in the folder."""
EXPERTS, LEARNT = "experts", "learnt"
"""What the names of the files begin with that hold experts' deltas, and what was learnt beside them."""
INSTEAD = "Give one of its models, or what was distilled from it."


def is_ensemble(folder: Path) -> bool:
    """Whether a model's folder is one that `ensemble` wrote; not where its `lfm.json` is damaged, which others say."""
    try:
        return (folder / "config.json").is_file() and KEY in described(folder)
    except LfmError:
        return False


def member(folder: Path, number: int) -> Path:
    """The folder of one of its models."""
    return folder / MEMBERS / str(number)


def members_in(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of each of its models, as their names begin with its folder and go on in it."""
    found: dict[str, list[str]] = {}
    for name in names:
        inside = re.fullmatch(rf"({MEMBERS}/\d+/)([^/]+)", name)
        if inside is not None:
            found.setdefault(inside[1], []).append(inside[2])
    return found
