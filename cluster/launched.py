"""A profile's cluster on a cloud: Ray's own launcher starts its head and ends what it has tagged with its name."""

import inspect
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import look
from cluster.connect import SETTINGS
from cluster.machines import NotUp
from cluster.manifests.rendering import documents, lacking
from cluster.profile import Profile
from cluster.seen import Seen, seen
from lfm.errors import LfmError

HEAD_PORT = 6379  # where the launcher's document has the head listen
NONE = "not found!"  # how Ray's sentence about a head that is not there ends


class LaunchFailed(LfmError, RuntimeError):
    """What Ray's launcher could not do."""

    def __init__(self, name: str, verb: str, said: str) -> None:
        super().__init__(name, verb, said)
        self.name, self.verb, self.said = name, verb, said

    def __str__(self) -> str:
        return (
            f"cluster {self.name!r}: 'ray {self.verb}' said {self.said!r}, expected it to do that. See what it has "
            "printed above, and whether this machine may use the cloud."
        )


def up(profile: Profile) -> None:
    """Start the head, whose autoscaler brings the rest; of one that is there only the settings are brought up to date.

    Raises:
        ProfileError: The profile lacks what the launcher has to know.
        LaunchFailed: It did not work.
    """
    _launcher(profile, "up", "--yes", "--no-restart", "--no-config-cache", "--disable-usage-stats")


def down(profile: Profile) -> bool:
    """End all machines that carry the cluster's name as Ray's tag, and no other; whether Ray was told to.

    Raises:
        ProfileError: The profile lacks what the launcher has to know.
        LaunchFailed: It did not work.
    """
    _launcher(profile, "down", "--yes")
    return True


def looked(profile: Profile) -> Seen:
    """What its head sees, which the launcher asks in our place.

    Raises:
        ProfileError: The profile lacks what the launcher has to know.
        NotUp: There is no head.
        LaunchFailed: It does not answer.
    """
    asked = ["python", "-c", inspect.getsource(look), f"127.0.0.1:{HEAD_PORT}"]
    said = _launcher(profile, "exec", f"RAY_AUTH_MODE=token {shlex.join(asked)}", shown=False)
    answer = next((line for line in reversed(said.splitlines()) if line.startswith("{")), "")
    if not answer:
        raise LaunchFailed(profile.name, "exec", _last(said))
    return seen(json.loads(answer))


def _launcher(profile: Profile, verb: str, *words: str, shown: bool = True) -> str:
    """Have Ray's launcher do something; what it prints, where that is not `shown`."""
    with _file(document(profile)) as path:
        ended = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", verb, path, *words],
            env={**os.environ, **SETTINGS},
            stdin=subprocess.DEVNULL,
            stdout=None if shown else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    if ended.returncode:
        if NONE in ended.stderr:
            raise NotUp(profile.name)
        raise LaunchFailed(profile.name, verb, _last(ended.stderr))
    return ended.stdout or ""


def document(profile: Profile) -> dict[str, Any]:
    """What the launcher is told.

    Raises:
        ProfileError: The profile lacks what it has to know.
    """
    for problem in lacking(profile):
        raise problem
    return documents(profile)["launcher"]


@contextmanager
def _file(told: dict[str, Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(json.dumps(told))  # which is YAML too
        yield str(path)


def _last(said: str) -> str:
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "nothing")
