"""The checkout and a user's files -> one package, which Ray unpacks on every machine of a cluster.

It always travels, also where the profile names an image: what runs there is what was planned here, and the image only
has to hold what that imports. It is named by what is in it, so that the same code is uploaded once.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lfm.errors import LfmError

FOLDERS = ("lfm", "operators", "cluster", "pipelines")
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # where Ray tells a job's process what the job was given
TOP = "package"  # of what Ray fetches by a URI it takes the one top folder away
MAX_BYTES = 64 << 20
SHOWN = 5

LEFT_OUT_FOLDERS = (".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "benchmarks", "node_modules")
LEFT_OUT_FILES = (
    *(".*", "*.pyc", "*.pyo"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.crt", "*.env"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials", "credentials.json", "*token", "*secret"),
)
"""What no cluster has a use for, and what must not leave this machine: hidden files such as ``.env``, and keys."""


class PackageTooLarge(LfmError, ValueError):
    """Code that is larger than code is."""

    def __init__(self, size: int, limit: int, largest: tuple[tuple[str, int], ...]) -> None:
        super().__init__(size, limit, largest)
        self.size, self.limit, self.largest = size, limit, largest

    def __str__(self) -> str:
        files = ", ".join(f"{name} ({_sized(size)})" for name, size in self.largest)
        return (
            f"package: {_sized(self.size)}, expected at most {_sized(self.limit)}. The largest files: {files}. Move "
            "data out of the code, and name it as an input."
        )


@dataclass(frozen=True, slots=True)
class Package:
    """Files as one.

    Attributes:
        digest: The SHA-256 of their names and bytes.
        data: A zip archive of them.
        size: How many bytes they have in all.
        files: How many they are.
    """

    digest: str
    data: bytes
    size: int
    files: int

    @property
    def key(self) -> str:
        """Where it lies in a store."""
        return f"packages/{self.digest}.zip"

    def __str__(self) -> str:
        return (
            f"package {self.digest[:12]} of {self.files} files, {_sized(len(self.data))} ({_sized(self.size)} unpacked)"
        )


def packaged(root: Path, own: Mapping[str, bytes], *, version: str, max_bytes: int = MAX_BYTES) -> Package:
    """Pack this project and a user's files.

    Args:
        root: The folder with this project's folders.
        own: The user's files by their names in the package.
        version: This project's, which the package says of itself.
        max_bytes: What all files may have.

    Raises:
        PackageTooLarge: They have more.
    """
    files = {**dict(_checkout(root)), **own, **_about(version)}
    size = sum(map(len, files.values()))
    if size > max_bytes:
        largest = sorted(((n, len(d)) for n, d in files.items()), key=lambda one: -one[1])[:SHOWN]
        raise PackageTooLarge(size, max_bytes, tuple(largest))
    names = sorted(files)
    lines = [f"{hashlib.sha256(files[name]).hexdigest()} {name}\n" for name in names]
    return Package(hashlib.sha256("".join(lines).encode()).hexdigest(), _zipped(files, names), size, len(names))


def uri_of(store: str, key: str) -> str:
    """A package's URI for Ray, by the store that it lies in: a folder, or ``s3://bucket/prefix``."""
    return f"{store}/{key}" if "://" in store else (Path(store) / key).as_uri()


def package_here() -> str:
    """The digest of the package that this process's job was given; empty where it was given none."""
    told = json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {}
    found = re.search(r"/packages/([0-9a-f]{64})\.zip$", told.get("working_dir") or "")
    return found[1] if found is not None else ""


def _checkout(root: Path) -> Iterator[tuple[str, bytes]]:
    """This project's files by their names; of a checkout also what says of what it consists."""
    project = root / "pyproject.toml"
    if project.is_file():
        yield project.name, project.read_bytes()
    for top in FOLDERS:
        for folder, below, names in os.walk(root / top):
            below[:] = [b for b in below if not _left_out_folder(Path(folder, b))]
            for name in names:
                if not _matches(name, LEFT_OUT_FILES):
                    path = Path(folder, name)
                    yield path.relative_to(root).as_posix(), path.read_bytes()


def _left_out_folder(path: Path) -> bool:
    return _matches(path.name, LEFT_OUT_FOLDERS) or (path / "pyvenv.cfg").exists()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), p) for p in patterns)


def _about(version: str) -> dict[str, bytes]:
    """What makes Python find this version of the project where the package is unpacked, and no other one."""
    text = f"Metadata-Version: 2.1\nName: learn-from-model\nVersion: {version}\n"
    return {f"learn_from_model-{version}.dist-info/METADATA": text.encode()}


def _zipped(files: Mapping[str, bytes], names: list[str]) -> bytes:
    """The same bytes of the same files: no clock and no user is in them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            about = zipfile.ZipInfo(f"{TOP}/{name}")
            about.external_attr = 0o644 << 16
            archive.writestr(about, files[name], zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _sized(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
