"""Bytes <-> digest: artifacts by what they contain, results by the fingerprint of what made them.

artifacts/<digest>/          an artifact's files and its manifest.json; moved in whole, then read-only
results/<fingerprint>.json   which artifact a step's fingerprint stands for: written last, this is the commit
runs/<run>/                  journal and logs (`lineage.py`)
quarantine/                  artifacts that turned out damaged
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lfm.errors import LfmError
from operators.artifact import KINDS, Artifact
from operators.models.foreign_code import PICKLES
from pipelines.faults import reached
from pipelines.storage.base import (
    MANIFEST as MANIFEST,
    DamagedFolder,
    Storage,
    at_once,
    below,
    digest_of,
    named,
    remove,
)
from pipelines.storage.digests import Digests


class UnsafeArtifact(LfmError, ValueError):
    """Files that must not be in an artifact: pickles, links, anything but plain files."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"artifact file {self.path!r} is {self.what}, expected safetensors, Parquet, JSON or plain text."


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a step's fingerprint stands for.

    Attributes:
        inputs: For each edge, what filled it: ``{kind, digest, uri}``, or a list or mapping of these; `uri` is
            empty for what another step made.
        components: What the fingerprint is a hash of.
        uri: Where it is, of an input from outside that the step handed on; empty for what the store holds.
    """

    fingerprint: str
    kind: str
    digest: str
    about: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""
    step: str = ""
    seconds: float = 0.0
    inputs: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, Any] = field(default_factory=dict)
    uri: str = ""


@dataclass(frozen=True, slots=True)
class Store:
    """Artifacts and results on one storage."""

    storage: Storage

    def put(self, path: Path, kind: str, about: Mapping[str, Any]) -> str:
        """Move a file or folder in as an artifact and return its digest.

        Raises:
            UnsafeArtifact: It holds something that no artifact may hold.
        """
        folder = path
        if path.is_file():
            folder = path.parent / f"{path.name}.artifact"
            folder.mkdir()
            path.rename(folder / path.name)
        files = []
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            mode = file.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise UnsafeArtifact(name, "a link or a device")
            if file.suffix.lower() in PICKLES:
                raise UnsafeArtifact(name, f"a {file.suffix} file, which may be a pickle")
            files.append(file)
        listed = described(folder, files)
        reached("put: files are hashed")
        manifest = canonical({"about": dict(about), "files": listed, "kind": kind})
        digest = hashlib.sha256(manifest).hexdigest()
        (folder / MANIFEST).write_bytes(manifest)
        reached("put: manifest is written")
        if not self.storage.adopt(folder, f"artifacts/{digest}") and not self.whole(digest):
            self.quarantine(digest)
            self.storage.adopt(folder, f"artifacts/{digest}")
        reached("put: artifact is in")
        return digest

    def get(self, digest: str) -> Artifact:
        """The artifact, with its files in a local folder.

        Raises:
            MissingArtifact: The store does not have it.
            DamagedArtifact: It was damaged, and is in quarantine now.
        """
        return self._fetched(digest, self.manifest(digest))

    def verified(self, digest: str, digests: Digests) -> Artifact:
        """The same, of which every byte was looked at since its files last changed.

        Raises:
            MissingArtifact: The store does not have it.
            DamagedArtifact: It was damaged, and is in quarantine now.
        """
        manifest = self.manifest(digest)
        found = self._fetched(digest, manifest)
        file = damaged(found.path, manifest["files"], digests)
        if file and self.storage.copies is not None:  # a copy, and what it is of may be whole
            remove(found.path)
            found = self._fetched(digest, manifest)
            file = damaged(found.path, manifest["files"], digests)
        if file:
            self.quarantine(digest)
            raise DamagedArtifact(digest, file)
        return found

    def _fetched(self, digest: str, manifest: Mapping[str, Any]) -> Artifact:
        try:
            folder = self.storage.fetch(f"artifacts/{digest}")
        except DamagedFolder as damage:
            self.quarantine(digest)
            raise DamagedArtifact(digest, damage.file) from damage
        return KINDS[manifest["kind"]](str(folder), digest, manifest["about"])

    def manifest(self, digest: str) -> dict[str, Any]:
        """What the store knows of an artifact: its kind, what was noted about it, its files' digests and sizes.

        Raises:
            MissingArtifact: The store does not have it.
            UnsafePath: A file's name leads out of it.
        """
        data = self.storage.read(f"artifacts/{digest}/{MANIFEST}")
        if data is None:
            raise MissingArtifact(digest)
        found: dict[str, Any] = json.loads(data)
        for name in found["files"]:
            below(Path(), name, f"artifact {digest[:12]}")
        return found

    def whole(self, digest: str, *, bytes_too: bool = False) -> bool:
        """Whether an artifact is complete: manifest, every file, every size; with `bytes_too`, every byte."""
        data = self.storage.read(f"artifacts/{digest}/{MANIFEST}")
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            return False
        files = json.loads(data)["files"]
        start = f"artifacts/{digest}/"
        sizes = {e.key.removeprefix(start): e.size for e in self.storage.entries(f"artifacts/{digest}")}
        if any(sizes.get(name) != expected["size"] for name, expected in files.items()):
            return False
        if not bytes_too:
            return True
        try:
            folder = self.storage.fetch(f"artifacts/{digest}")
        except DamagedFolder:
            return False
        return all(digest_of(folder / name) == expected["sha256"] for name, expected in files.items())

    def quarantine(self, digest: str) -> None:
        """Move a damaged artifact out of the way."""
        self.storage.discard(f"artifacts/{digest}", f"quarantine/{digest}-{os.urandom(4).hex()}")

    def commit(self, result: Result) -> Result:
        """Make `result` what its fingerprint stands for; one that came first and is whole stays."""
        key = f"results/{result.fingerprint}.json"
        data = canonical(asdict(result))
        reached("commit: before the result")
        if self.storage.put_if_absent(key, data):
            reached("commit: result is in")
            return result
        earlier = self.result(result.fingerprint)
        if earlier is not None and earlier.digest != result.digest and self.whole(earlier.digest):
            return earlier
        old = self.storage.read(key)
        if old is not None and old != data:
            self.storage.replace_if_match(key, data, old)
        return result

    def result(self, fingerprint: str) -> Result | None:
        """What a fingerprint stands for, if anything; the artifact may be damaged (`hit` looks)."""
        data = self.storage.read(f"results/{fingerprint}.json")
        return None if data is None else Result(**json.loads(data))

    def hit(self, fingerprint: str) -> Result | None:
        """A result whose artifact is there and complete; what is outside is for the plan's pin and the step to see."""
        result = self.result(fingerprint)
        return result if result is not None and (result.uri or self.whole(result.digest)) else None

    def hits(self, fingerprints: Iterable[str]) -> dict[str, Result]:
        """The same for many at once, by fingerprint: those that have a result."""
        found = at_once(self.hit, dict.fromkeys(fingerprints))
        return {r.fingerprint: r for r in found if r is not None}


def described(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a manifest says of files below a folder, by their names there; `damaged` holds it against them."""
    paths = list(files)
    sums = at_once(digest_of, paths)
    return {
        path.relative_to(folder).as_posix(): {"sha256": digest, "size": path.stat().st_size}
        for path, digest in zip(paths, sums, strict=True)
    }


def damaged(folder: Path, files: Mapping[str, Any], digests: Digests) -> str:
    """The first file that is not what the manifest says; empty where all are.

    Raises:
        StorageFailed: One could not be read, which does not say that it is damaged.
    """
    with named(f"{folder.parent.name} {folder.name[:12]}"):
        try:
            there = digests.of(folder / name for name in files)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            return Path(error.filename or folder).name
    return next((n for (n, expected), is_ in zip(files.items(), there, strict=True) if is_ != expected["sha256"]), "")


class DamagedArtifact(LfmError, ValueError):
    """An artifact whose files are not what they were when it was put in."""

    def __init__(self, digest: str, file: str) -> None:
        super().__init__(digest, file)
        self.digest, self.file = digest, file

    def __str__(self) -> str:
        return (
            f"artifact {self.digest[:12]}: {self.file!r} is not what was put in; it is in quarantine now. "
            "Run the step that makes it again."
        )


class MissingArtifact(LfmError, LookupError):
    """An artifact that the store does not have (any more)."""

    def __init__(self, digest: str) -> None:
        super().__init__(digest)
        self.digest = digest

    def __str__(self) -> str:
        return f"artifact {self.digest[:12]} is not in the store. Run the step that makes it again."


def canonical(value: Any) -> bytes:
    """JSON with one spelling for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
