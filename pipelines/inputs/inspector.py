"""The plan's eyes: finds, checks and pins what a pipeline takes from outside."""

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from lfm.errors import LfmError
from operators.artifact import Artifact, kind_of
from pipelines.ancestry import find_artifact
from pipelines.credentials import masked
from pipelines.inputs import buckets, hub
from pipelines.inputs.model_files import damaged, lacking, leading_out
from pipelines.plan import InputProblem
from pipelines.storage.digests import Digests
from pipelines.store import Store

STORED = "lfm://"

A = TypeVar("A", bound=Artifact)


class InputChanged(LfmError, RuntimeError):
    """An input that is not what it was when the run was planned."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.uri = uri

    def __str__(self) -> str:
        return f"input {self.uri!r}: changed after the run was planned, expected it to stay. Start a new run."


@dataclass
class Looks:
    """An `Inspector` for ``hf://``, ``s3://``, ``lfm://`` and ``python://`` names and for local files and folders.

    Attributes:
        memory: A sqlite file that remembers digests by size, times and inode, so that a file is hashed once.
        store: Where ``lfm://`` names are looked up; without one they are not looked at, nor pinned.
        hash: False pins no local file: what depends on one stays unknown.
        hashing: Called before a file is hashed, with its path and size in bytes.
    """

    memory: Path
    store: Store | None
    hash: bool = True
    hashing: Callable[[str, int], None] = field(default=lambda path, size: None)

    def check(self, artifact: A) -> A | None:
        """See `Inspector`."""
        scheme, colon, _ = artifact.uri.partition("://")
        if colon and (shown := masked(artifact.uri)) != artifact.uri:
            fix = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or HF_TOKEN."
            raise InputProblem(shown, "holds a password or a token, which would be written down", fix)
        if scheme == "lfm" and colon:
            return None if self.store is None else self._stored(artifact, self.store)
        if scheme in ("s3", "hf") and colon:
            return self._elsewhere(artifact)
        if scheme == "python" and colon:
            return artifact
        if colon:
            raise InputProblem(
                artifact.uri,
                f"has the scheme {scheme!r}",
                "Give a local path, hf://name[@revision], s3://bucket/key, lfm://RUN/STEP or python://name.",
            )
        try:
            return self._local(artifact)
        except (OSError, RuntimeError) as error:  # no right to look, a name too long, ``~`` of nobody
            what = (getattr(error, "strerror", None) or str(error)).lower().removesuffix(".")
            raise InputProblem(
                artifact.uri, f"cannot be looked at ({what})", "Check the path and who may read it."
            ) from error

    def _elsewhere(self, artifact: A) -> A | None:
        found = hub.check(artifact) if artifact.uri.startswith(hub.SCHEME) else buckets.check(artifact)
        problem = None if found is None else damaged(type(artifact), found.path)
        if problem is not None:
            raise InputProblem(artifact.uri, *problem)
        return found

    def _local(self, artifact: A) -> A:
        path = Path(artifact.uri).expanduser()
        if not path.exists():
            raise InputProblem(artifact.uri, f"is not there (looked at {str(path.absolute())!r})", "Check the path.")
        files = list(_files(path))
        if not files or not any(f.stat().st_size for f in files):
            raise InputProblem(artifact.uri, "is empty", "Give a file or folder with something in it.")
        for file in files:
            if not os.access(file, os.R_OK):
                raise InputProblem(artifact.uri, f"holds {file.name!r}, which cannot be read", "Give read access.")
        names = [f.relative_to(path).as_posix() for f in files] if path.is_dir() else [path.name]
        kind = type(artifact)
        problem = lacking(kind, names) or leading_out(kind, path, files) or damaged(kind, path)
        if problem is not None:
            raise InputProblem(artifact.uri, *problem)
        return replace(artifact, uri=str(path.absolute()))

    def pin(self, artifact: A) -> A:
        """See `Inspector`."""
        if artifact.uri.startswith("python://"):
            named = f"{artifact.uri}@{platform.python_version()}"
            return replace(artifact, digest=hashlib.sha256(named.encode()).hexdigest())
        if artifact.uri.startswith(STORED):
            assert self.store is not None, artifact
            found = self._stored(artifact, self.store)
            return replace(found, uri=f"{STORED}{found.digest}")
        if artifact.uri.startswith(hub.SCHEME):
            return hub.pin(artifact)
        if artifact.uri.startswith(buckets.SCHEME):
            return buckets.pin(artifact)
        path = Path(artifact.uri).expanduser().absolute()
        return replace(artifact, uri=str(path), digest=self._digest(path) if self.hash else "")

    def _stored(self, artifact: A, store: Store) -> A:
        """What a name of the store stands for, with its local folder."""
        name = artifact.uri.removeprefix(STORED)
        try:
            found = store.get(find_artifact(store, name))
        except LfmError as error:
            raise InputProblem(artifact.uri, f"is not in the store ({error})", "Look with lfm show last.") from error
        if type(found) is not type(artifact):
            kinds = kind_of(type(found)), kind_of(type(artifact))
            raise InputProblem(artifact.uri, f"is a {kinds[0]}, expected a {kinds[1]}", "Name another.")
        return found

    def _digest(self, path: Path) -> str:
        digests = Digests(self.memory, self.hashing)
        files = list(_files(path))
        alone = buckets.ending(path.name)  # of a single file's name only that decides how it is read
        names = [f.relative_to(path).as_posix() if path.is_dir() else alone for f in files]
        named = zip(names, digests.of(files), strict=True)
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(named))
        return hashlib.sha256(lines.encode()).hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """A file itself, or every file below a folder but hidden ones."""
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(folder) / n for n in sorted(names) if not n.startswith("."))


def fetch(artifact: A) -> A:
    """The same artifact with a local path, where its URI names something elsewhere.

    Raises:
        InputChanged: It is not what was pinned any more.
    """
    if artifact.uri.startswith(hub.SCHEME):
        return hub.fetch(artifact)
    if artifact.uri.startswith(buckets.SCHEME):
        found = buckets.fetch(artifact)
        if found is None:
            raise InputChanged(artifact.uri)
        return found
    return artifact
