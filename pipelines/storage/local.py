"""A store in a folder, on a local disk or on NFS: links and renames are what cannot be done twice."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISLNK

from pipelines.faults import reached
from pipelines.storage.base import DamagedFolder, Entry, named, new_scratch, own_name, remove


class LocalStorage:
    """A folder on a local disk or NFS."""

    copies = None

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.scratches = self.root / "scratch"
        with named(f"store {str(self.root)!r}"):
            self.scratches.mkdir(parents=True, exist_ok=True)
            if not os.access(self.scratches, os.W_OK):
                raise PermissionError(13, "permission denied")

    @property
    def uri(self) -> str:
        """The folder."""
        return str(self.root)

    def read(self, key: str) -> bytes | None:
        """See `Storage`."""
        with named(f"store {key!r}"):
            try:
                return (self.root / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def list(self, prefix: str, *, after: str = "") -> tuple[str, ...]:
        """See `Storage`."""
        start = len(os.path.join(self.root, ""))
        # Text alone: a path object for each of a journal's ten thousand segments would take longer than reading them.
        with named(f"store {prefix!r}"):
            walked = os.walk(self.root / prefix, onerror=_unless_gone)
            found = [os.path.join(folder, name)[start:] for folder, _, names in walked for name in names]
        return tuple(sorted(key for key in found if key > after))

    def entries(self, prefix: str) -> tuple[Entry, ...]:
        """See `Storage`."""
        found: list[Entry] = []
        if (self.root / prefix).is_symlink():
            return ()
        for key in self.list(prefix):
            with named(f"store {key!r}"), contextlib.suppress(FileNotFoundError):  # what went in between
                stat = os.lstat(self.root / key)
                if not S_ISLNK(stat.st_mode):  # nobody wrote one, and what it leads to is not in the store
                    found.append(Entry(key, stat.st_size, stat.st_mtime))
        return tuple(found)

    def folders(self, prefix: str) -> tuple[str, ...]:
        """See `Storage`."""
        with named(f"store {prefix!r}"):
            try:
                with os.scandir(self.root / prefix) as found:
                    return tuple(sorted(e.name for e in found if e.is_dir()))
            except FileNotFoundError:
                return ()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Storage`: a whole file is linked to its name, which fails where the name exists."""
        with self._written(key, data) as temporary:
            try:
                os.link(temporary, self.root / key)
            except FileExistsError:
                return False
            reached("write: key is there")
        return True

    def replace_if_match(self, key: str, data: bytes, old: bytes) -> bool:
        """See `Storage`: compare and rename under a lock."""
        locks = self.root / "locks"
        with self._written(key, data) as temporary:
            locks.mkdir(exist_ok=True)
            # One of 256 for many keys: who deleted locks would let two in at once, so there are never more.
            with (locks / hashlib.sha256(key.encode()).hexdigest()[:2]).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self.read(key) != old:
                    return False
                os.rename(temporary, self.root / key)
                reached("replace: key is replaced")
        return True

    def adopt(self, folder: Path, key: str) -> bool:
        """See `Storage`: one rename, after everything in the folder is on disk and read-only."""
        target = self.root / key
        with named(f"store {key!r}"):
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    path.chmod(0o444)
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            reached("adopt: files are on disk")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(folder, target)
            except OSError:
                if target.is_dir():
                    return False
                raise
            reached("adopt: folder is in")
            _sync_folder(target.parent)
        return True

    def fetch(self, key: str) -> Path:
        """See `Storage`: it lies there already, but a link is nothing that `adopt` put there."""
        target = self.root / key
        if target.is_symlink():
            raise DamagedFolder(f"store {key!r}", target.name)
        for folder, folders, names in os.walk(target):
            for path in (Path(folder) / n for n in (*folders, *names)):
                if path.is_symlink():
                    raise DamagedFolder(f"store {key!r}", path.relative_to(target).as_posix())
        return target

    def discard(self, key: str, to: str) -> None:
        """See `Storage`."""
        with named(f"store {key!r}"):
            (self.root / to).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(self.root / key, self.root / to)
            except FileNotFoundError:
                return

    def delete(self, key: str) -> None:
        """See `Storage`: moved away first, so that nobody sees half of a folder."""
        gone = self.scratches / own_name()
        with named(f"store {key!r}"):
            try:
                os.rename(self.root / key, gone)
            except FileNotFoundError:
                return
            if gone.is_dir() and not gone.is_symlink():
                remove(gone)
            else:
                gone.unlink()

    def append(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        path = self.root / key
        with named(f"store {key!r}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                before = file.tell()
                rest = memoryview(data)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:  # after some of it, maybe
                    file.truncate(before)
                    raise

    def scratch(self) -> Path:
        """See `Storage`."""
        return new_scratch(self.scratches)

    @contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[Path]:
        target = self.root / key
        temporary = self.scratches / own_name()
        with named(f"store {key!r}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                reached("write: bytes are on disk")
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)


def _unless_gone(error: OSError) -> None:
    """What `os.walk` could not list, it would leave out without a word."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
