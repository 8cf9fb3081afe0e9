"""Bytes by key: the verbs that a store stands on, one implementation per scheme."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from cluster import processes
from lfm.errors import LfmError

MANIFEST = "manifest.json"

T = TypeVar("T")
U = TypeVar("U")


class UnsupportedStorage(LfmError, ValueError):
    """A location whose scheme has no conditional writes here."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.uri = uri

    def __str__(self) -> str:
        return f"store {self.uri!r}: expected a local folder or s3://bucket/prefix. Give one with --store."


class StorageFailed(LfmError, OSError):
    """A write or read that storage refused (disk full, permission denied); nothing was committed."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where, self.what = where, what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. Make room or give access, then resume the run."


class UnusableStore(StorageFailed):
    """A location where nothing can be kept."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected a location that can be written to. Give another one with --store."


class DamagedFolder(LfmError, ValueError):
    """A folder whose files are not what its manifest says."""

    def __init__(self, where: str, file: str) -> None:
        super().__init__(where, file)
        self.where, self.file = where, file

    def __str__(self) -> str:
        return f"{self.where}: {self.file!r} is not what the manifest says. Resume the run to make it again."


class UnsafePath(LfmError, ValueError):
    """A file's name that somebody else gave and that leads out of the folder that it is said to be in."""

    def __init__(self, where: str, name: str) -> None:
        super().__init__(where, name)
        self.where, self.name = where, name

    def __str__(self) -> str:
        return (
            f"{self.where}: the name {self.name!r} leads out of its folder, expected one below it. Nothing of it was "
            "read or written; look at who made it."
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its size in bytes and when it was written, in seconds since 1970."""

    key: str
    size: int
    modified: float


class Storage(Protocol):
    """Read, list, put-if-absent, replace-if-match; and folders, which move in whole.

    Keys are relative paths with ``/``. A reader never sees half of what a writer wrote. A folder holds a
    `MANIFEST`, which is there last and goes first.
    """

    @property
    def uri(self) -> str:
        """Where it is."""

    @property
    def scratches(self) -> Path:
        """The folder on this machine with what `scratch` has made."""

    @property
    def copies(self) -> Path | None:
        """The folder on this machine with copies of what `fetch` had to transfer; None where it never has to."""

    def read(self, key: str) -> bytes | None:
        """The bytes, or None where there are none."""

    def list(self, prefix: str, *, after: str = "") -> tuple[str, ...]:
        """Every key below the folder `prefix`, sorted; with `after`, a key, only those that sort after it."""

    def entries(self, prefix: str) -> tuple[Entry, ...]:
        """The same, with what is known of each."""

    def folders(self, prefix: str) -> tuple[str, ...]:
        """The names of the folders directly below the folder `prefix`, sorted; an empty one may be left out."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless the key exists; False if it did."""

    def replace_if_match(self, key: str, data: bytes, old: bytes) -> bool:
        """Write if the key still holds `old`; False if it does not."""

    def adopt(self, folder: Path, key: str) -> bool:
        """Move a local folder in, as one; False, and the folder stays, where `key` exists."""

    def fetch(self, key: str) -> Path:
        """A local folder with what `adopt` put at `key`; its files are read-only.

        Raises:
            DamagedFolder: What had to be transferred is not what the manifest says, or a link lies where a file was.
        """

    def discard(self, key: str, to: str) -> None:
        """Move what is at `key` away to the key `to`; nothing happens where there is nothing."""

    def delete(self, key: str) -> None:
        """Delete what is at `key`, a file or a folder; nothing happens where there is nothing."""

    def append(self, key: str, data: bytes) -> None:
        """Add to a key that has one writer; readers may see it late, and a crash may lose the end."""

    def scratch(self) -> Path:
        """A new empty local folder of this process, from which `adopt` moves."""


def own_name() -> str:
    """A name for a scratch file or folder that nobody else gives, and that says whose it is."""
    me = processes.this()
    return f"{me['pid']}-{round(me['born'] * 100)}-{uuid.uuid4().hex[:12]}-{me['host']}"


def owner(name: str) -> dict[str, object]:
    """The process that gave a name with `own_name`; an empty one where none did."""
    pid, _, rest = name.partition("-")
    born, _, rest = rest.partition("-")
    _, _, host = rest.partition("-")
    if not (pid.isdigit() and born.isdigit() and host):
        return {}
    return {"host": host, "pid": int(pid), "born": int(born) / 100}


def new_scratch(below: Path) -> Path:
    """A new empty folder of this process."""
    folder = below / own_name()
    with named(f"store {str(folder)!r}"):
        folder.mkdir(parents=True)
    return folder


def cache() -> Path:
    """Where this user keeps on this machine what can be fetched or computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lfm"


def below(folder: Path, name: str, where: str) -> Path:
    """A file's path in a folder, by the name that a manifest or a listing has for it.

    Raises:
        UnsafePath: It is absolute or has ``..`` in it.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UnsafePath(where, name)
    return folder / path


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copied(source: Path, target: Path) -> str:
    """Copy a file that nobody changes; returns the SHA-256 of its bytes, which are on disk by then.

    They are hashed while the kernel copies them and the disk is waited for: both read what memory holds of the source.
    """
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(digest_of, source)
        shutil.copyfile(source, target)
        with target.open("rb") as written:
            os.fsync(written.fileno())
        return hashed.result()


def remove(folder: Path) -> None:
    """Delete a scratch folder with everything in it."""
    shutil.rmtree(folder, ignore_errors=True)


def at_once(act: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """`act` on each item, several at a time: most of it is waiting for storage to answer."""
    each = list(items)
    if len(each) < 2:  # most artifacts are one file, for which a thread would take longer to start
        return [act(one) for one in each]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(act, each))


@contextmanager
def named(where: str) -> Iterator[None]:
    """Turn the operating system's error into one that says where it happened."""
    try:
        yield
    except LfmError:
        raise
    except OSError as error:
        raise StorageFailed(where, (error.strerror or str(error)).lower()) from error
