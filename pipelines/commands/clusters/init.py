"""`lfm cluster init`: write a profile to begin with."""

from argparse import Namespace
from pathlib import Path

from cluster.template import template
from lfm.errors import LfmError


class ProfileNotWritten(LfmError, OSError):
    """A place where no profile can be written, or where there is something already."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"{self.path!r}: {self.what}, expected a new file in a folder that is there. Give another name."


def act(arguments: Namespace) -> int:
    """Print a commented profile, or write it to a file that is not there yet."""
    text = template(arguments.place)
    if not arguments.profile:
        print(text, end="")
        return 0
    try:
        with Path(arguments.profile).open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ProfileNotWritten(arguments.profile, (error.strerror or str(error)).lower()) from error
    print(f"wrote {arguments.profile}, a profile for {arguments.place}: change what is not as you have it")
    return 0
