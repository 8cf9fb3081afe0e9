"""Bytes by key: the four verbs that a store stands on, one implementation per scheme."""

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lfm.errors import LfmError


class UnsupportedStorage(LfmError, ValueError):
    """A location whose scheme has no conditional writes here."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.uri = uri

    def __str__(self) -> str:
        return f"store {self.uri!r}: expected a local folder. Give one with --store."


class StorageFailed(LfmError, OSError):
    """A write or read that storage refused (disk full, permission denied); nothing was committed."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where, self.what = where, what

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. Make room or give access, then resume the run."


class Storage(Protocol):
    """Read, list, put-if-absent, replace-if-match; and folders, which move in whole.

    Keys are relative paths with ``/``. A reader never sees half of what a writer wrote.
    """

    @property
    def uri(self) -> str:
        """Where it is."""

    def read(self, key: str) -> bytes | None:
        """The bytes, or None where there are none."""

    def list(self, prefix: str) -> tuple[str, ...]:
        """Every key below the folder `prefix`, sorted."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless the key exists; False if it did."""

    def replace_if_match(self, key: str, data: bytes, old: bytes) -> bool:
        """Write if the key still holds `old`; False if it does not."""

    def adopt(self, folder: Path, key: str) -> bool:
        """Move a local folder in, as one; False, and the folder stays, where `key` exists."""

    def fetch(self, key: str) -> Path:
        """A local folder with what `adopt` put at `key`; its files are read-only."""

    def discard(self, key: str, to: str) -> None:
        """Move what is at `key` away to the key `to`."""

    def delete(self, key: str) -> None:
        """Delete what is at `key`, a file or what `adopt` put there; nothing happens where there is nothing."""

    def append(self, key: str, data: bytes) -> None:
        """Add to a key that has one writer; readers may see it late, and a crash may lose the end."""

    def scratch(self) -> Path:
        """A new empty local folder from which `adopt` moves without copying."""


def open_storage(uri: str) -> Storage:
    """The storage behind a location.

    Raises:
        UnsupportedStorage: The scheme cannot write conditionally here.
        StorageFailed: It cannot be written to.
    """
    if "://" in uri:
        raise UnsupportedStorage(uri)
    return LocalStorage(Path(uri))


class LocalStorage:
    """A folder on a local disk or NFS."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        with _named(f"store {str(self.root)!r}"):
            (self.root / "scratch").mkdir(parents=True, exist_ok=True)
            if not os.access(self.root / "scratch", os.W_OK):
                raise PermissionError(13, "permission denied")

    @property
    def uri(self) -> str:
        """The folder."""
        return str(self.root)

    def read(self, key: str) -> bytes | None:
        """See `Storage`."""
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, prefix: str) -> tuple[str, ...]:
        """See `Storage`."""
        base = self.root / prefix
        found = (Path(folder) / name for folder, _, names in os.walk(base) for name in names)
        return tuple(sorted(p.relative_to(self.root).as_posix() for p in found))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Storage`: a whole file is linked to its name, which fails where the name exists."""
        with self._written(key, data) as temporary:
            try:
                os.link(temporary, self.root / key)
            except FileExistsError:
                return False
        return True

    def replace_if_match(self, key: str, data: bytes, old: bytes) -> bool:
        """See `Storage`: compare and rename under a lock on a file beside it."""
        with self._written(key, data) as temporary, (self.root / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.read(key) != old:
                return False
            os.rename(temporary, self.root / key)
        return True

    def adopt(self, folder: Path, key: str) -> bool:
        """See `Storage`: one rename, after everything in the folder is on disk and read-only."""
        target = self.root / key
        with _named(f"store {key!r}"):
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    path.chmod(0o444)
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(folder, target)
            except OSError:
                if target.is_dir():
                    return False
                raise
            _sync_folder(target.parent)
        return True

    def fetch(self, key: str) -> Path:
        """See `Storage`: it lies there already."""
        return self.root / key

    def discard(self, key: str, to: str) -> None:
        """See `Storage`."""
        with _named(f"store {key!r}"):
            (self.root / to).parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.root / key, self.root / to)

    def delete(self, key: str) -> None:
        """See `Storage`: moved away first, so that nobody sees half of a folder."""
        gone = self.root / "scratch" / uuid.uuid4().hex
        try:
            os.rename(self.root / key, gone)
        except FileNotFoundError:
            return
        if gone.is_dir():
            remove(gone)
        else:
            gone.unlink()

    def append(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        path = self.root / key
        with _named(f"store {key!r}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(data)

    def scratch(self) -> Path:
        """See `Storage`."""
        folder = self.root / "scratch" / uuid.uuid4().hex
        with _named(f"store {str(folder)!r}"):
            folder.mkdir()
        return folder

    @contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[Path]:
        target = self.root / key
        temporary = self.root / "scratch" / f"{uuid.uuid4().hex}.part"
        with _named(f"store {key!r}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(folder: Path) -> None:
    """Delete a scratch folder with everything in it."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Turn the operating system's error into one that says where it happened."""
    try:
        yield
    except LfmError:
        raise
    except OSError as error:
        raise StorageFailed(where, (error.strerror or str(error)).lower()) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
