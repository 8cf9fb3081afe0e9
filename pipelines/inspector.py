"""The plan's eyes: finds, checks and pins what a pipeline takes from outside."""

import hashlib
import os
import platform
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from operators.artifact import Artifact
from pipelines.plan import InputProblem
from pipelines.storage import digest_of

SETTLED_NS = 2_000_000_000  # a file that changed this recently may change again within the clock's resolution

A = TypeVar("A", bound=Artifact)


@dataclass
class Looks:
    """An `Inspector` for ``python://`` and ``hf://`` names and for local files and folders.

    Attributes:
        memory: A sqlite file that remembers digests by size, times and inode, so that a file is hashed once.
        hash: False pins no local file: what depends on one stays unknown.
        hashing: Called before a file is hashed, with its path and size in bytes.
    """

    memory: Path
    hash: bool = True
    hashing: Callable[[str, int], None] = field(default=lambda path, size: None)

    def check(self, artifact: A) -> A | None:
        """See `Inspector`."""
        scheme, colon, _ = artifact.uri.partition("://")
        if colon and scheme in ("python", "hf"):
            return artifact if scheme == "python" else None
        if colon:
            raise InputProblem(
                artifact.uri,
                f"has the scheme {scheme!r}",
                "Give a local path, hf://name[@revision] or python://name.",
            )
        path = Path(artifact.uri).expanduser()
        if not path.exists():
            raise InputProblem(artifact.uri, f"is not there (looked at {str(path.absolute())!r})", "Check the path.")
        files = list(_files(path))
        if not files or not any(f.stat().st_size for f in files):
            raise InputProblem(artifact.uri, "is empty", "Give a file or folder with something in it.")
        for file in files:
            if not os.access(file, os.R_OK):
                raise InputProblem(artifact.uri, f"holds {file.name!r}, which cannot be read", "Give read access.")
        return replace(artifact, uri=str(path.absolute()))

    def pin(self, artifact: A) -> A:
        """See `Inspector`."""
        if artifact.uri.startswith("python://"):
            named = f"{artifact.uri}@{platform.python_version()}"
            return replace(artifact, digest=hashlib.sha256(named.encode()).hexdigest())
        if artifact.uri.startswith("hf://"):
            return _pin_hub(artifact)
        path = Path(artifact.uri).expanduser().absolute()
        return replace(artifact, uri=str(path), digest=self._digest(path) if self.hash else "")

    def _digest(self, path: Path) -> str:
        with self._remembered() as known:
            if path.is_file():
                return self._file(path, known)
            digests = {f.relative_to(path).as_posix(): self._file(f, known) for f in _files(path)}
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _file(self, path: Path, known: "sqlite3.Connection") -> str:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        row = known.execute(
            "SELECT digest FROM files WHERE path=? AND size=? AND mtime=? AND ctime=? AND inode=?", key
        ).fetchone()
        if row is not None:
            return str(row[0])
        self.hashing(str(path), stat.st_size)
        digest = digest_of(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:
            known.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (*key, digest))
        return digest

    def _remembered(self) -> "sqlite3.Connection":
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.memory, timeout=60)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS files"
            " (path TEXT PRIMARY KEY, size INT, mtime INT, ctime INT, inode INT, digest TEXT)"
        )
        return connection


def _files(path: Path) -> Iterator[Path]:
    """A file itself, or every file below a folder but hidden ones."""
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(folder) / n for n in sorted(names) if not n.startswith("."))


def _pin_hub(artifact: A) -> A:
    """The commit that a hub name stands for now."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = artifact.uri.removeprefix("hf://").partition("@")
    repo_type = "dataset" if type(artifact).__name__ == "Dataset" else "model"
    try:
        info = huggingface_hub.HfApi().repo_info(name, revision=revision or None, repo_type=repo_type, timeout=30)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what = f"could not be looked up ({str(error).strip().partition(chr(10))[0]})"
        raise InputProblem(artifact.uri, what, "Check the name, the network and, for a gated one, HF_TOKEN.") from error
    return replace(artifact, uri=f"hf://{name}@{info.sha}", digest=str(info.sha))


def fetch(artifact: A) -> A:
    """The same artifact with a local path, where its URI names the hub."""
    if not artifact.uri.startswith("hf://"):
        return artifact
    import huggingface_hub

    name, _, revision = artifact.uri.removeprefix("hf://").partition("@")
    repo_type = "dataset" if type(artifact).__name__ == "Dataset" else "model"
    folder = huggingface_hub.snapshot_download(
        name,
        revision=revision,
        repo_type=repo_type,
        ignore_patterns=["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack"],
    )
    return replace(artifact, uri=folder)
