"""Where a profile says Ray's token is -> the variables by which Ray finds it."""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from lfm.errors import LfmError

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class NoToken(LfmError, LookupError):
    """A token that is not where the profile says."""

    def __init__(self, token: str, what: str) -> None:
        super().__init__(token, what)
        self.token, self.what = token, what

    def __str__(self) -> str:
        return f"token {self.token!r}: {self.what}, expected Ray's token. Put it there, or name another place."


def authenticated(environment: Mapping[str, str], token: str) -> dict[str, str]:
    """An environment whose processes authenticate with a token, and with no other.

    Args:
        environment: What else is in it.
        token: Where the token is: ``env:NAME`` or ``file:PATH``; empty for a cluster that asks for none.

    Raises:
        NoToken: It is not there.
    """
    rest = {k: v for k, v in environment.items() if k not in VARIABLES}
    kind, _, where = token.partition(":")
    match kind:
        case "":
            return {**rest, "RAY_AUTH_MODE": "disabled"}
        case "file":
            path = Path(where).expanduser()
            if not path.is_file():
                raise NoToken(token, "no such file")
            return {**rest, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        case "env":
            if not environment.get(where):
                raise NoToken(token, "no such variable")
            return {**rest, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": environment[where]}
    raise NoToken(token, "a place inside of Kubernetes")


def made_token(path: Path) -> str:
    """Where a token is that only this user may read: it is made once, and never printed."""
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
    return f"file:{path}"
