"""What a running step may touch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from operators.artifact import Artifact
from operators.resources import Resources

A = TypeVar("A", bound=Artifact)


class Workspace(Protocol):
    """Handed to every operator body; the only door to disk, randomness and progress."""

    @property
    def scratch(self) -> Path:
        """An empty folder of this step's own, gone when it ends."""

    @property
    def seed(self) -> int:
        """Decided by the fingerprint, so that a retry draws the same numbers."""

    @property
    def resources(self) -> Resources:
        """What the step was given."""

    def progress(self, done: int, total: int, **measures: float) -> None:
        """Say how far the step is, and what it measures there (a loss): cheap, call it at every step."""

    def keep(self, folder: Path) -> None:
        """Keep a folder below `scratch` as a checkpoint of this step.

        It holds a `manifest.json`, a JSON object to which what is known of the other files is added as ``files``. The
        newest whole one of the last two counts; both go when the step ends well.
        """

    def kept(self) -> Path | None:
        """The checkpoint that an earlier attempt at the same fingerprint kept last, or None."""

    def leaving(self) -> bool:
        """Whether this machine is about to be taken away: keep what there is, and raise `Preempted`."""

    def save(self, kind: type[A], path: Path, about: Mapping[str, object] | None = None) -> A:
        """Make what lies at `path`, a file or a folder below `scratch`, an artifact.

        The files move into the store when the step ends well; until then nothing is committed.
        """

    def register(self, artifact: Artifact, name: str, alias: str) -> int:
        """Give an input a version under `name`, unless it has one, move `alias` to that, and return its number."""
