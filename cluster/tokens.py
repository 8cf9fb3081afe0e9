"""Where a profile says Ray's token is -> the variables by which Ray finds it."""

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from cluster.profile import CLOUDS, Profile
from lfm.errors import LfmError

FOUND = "RAY_AUTH_TOKEN"
VARIABLES = ("RAY_AUTH_MODE", FOUND, "RAY_AUTH_TOKEN_PATH")


class NoToken(LfmError, LookupError):
    """A token that is not where the profile says."""

    def __init__(self, token: str, what: str) -> None:
        super().__init__(token, what)
        self.token, self.what = token, what

    def __str__(self) -> str:
        return f"token {self.token!r}: {self.what}, expected Ray's token. Put it there, or name another place."


class TokenInCluster(LfmError, LookupError):
    """A token that only its cluster in Kubernetes has."""

    def __init__(self, name: str, namespace: str, secret: str) -> None:
        super().__init__(name, namespace, secret)
        self.name, self.namespace, self.secret = name, namespace, secret

    def __str__(self) -> str:
        read = f"kubectl -n {self.namespace} get secret {self.secret} -o jsonpath='{{.data.auth_token}}' | base64 -d"
        return (
            f"cluster {self.name!r}: {FOUND} is not set, expected the token of its Ray, which secret {self.secret!r} "
            f"has. Set it: export {FOUND}=$({read}); or name its place in the profile's 'token'."
        )


def outside(profile: Profile, environment: Mapping[str, str]) -> str:
    """Where a machine that is none of the cluster's finds its token.

    What `lfm cluster render` and the launchers start asks for one, whatever the profile says of it.

    Raises:
        TokenInCluster: It is in Kubernetes, where a secret of the cluster's name has it if the profile names none.
        ProfileError: A cluster on a cloud has another than the profile's, which names none.
    """
    kind, _, secret = profile.token.partition(":")
    if profile.place in CLOUDS:
        profile.require(kind == "file", "token", "file:PATH, as it was copied to the machines")
    if profile.place != "kuberay" or kind not in ("", "secret"):
        return profile.token
    if not environment.get(FOUND):
        raise TokenInCluster(profile.name, profile.namespace, secret or profile.name)
    return f"env:{FOUND}"


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
