"""`lfm cluster init`: write a profile to begin with."""

from argparse import Namespace
from pathlib import Path

from cluster.template import template
from lfm.errors import LfmError


class FileThere(LfmError, FileExistsError):
    """A file that would be overwritten."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path!r}: there is one already, expected a new file. Give another name, or delete it."


def act(arguments: Namespace) -> int:
    """Print a commented profile, or write it to a file that is not there yet."""
    text = template(arguments.place)
    if not arguments.profile:
        print(text, end="")
        return 0
    try:
        with Path(arguments.profile).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileThere(arguments.profile) from None
    print(f"wrote {arguments.profile}, a profile for {arguments.place}: change what is not as you have it")
    return 0
