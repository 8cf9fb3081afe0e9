"""File -> its digest, which is remembered, so that a file is hashed once while nobody changes it."""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.storage.base import digest_of

SETTLED_NS = 2_000_000_000  # a file that changed this recently may change again within the clock's resolution


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests by path, size, times and inode.

    Attributes:
        memory: The sqlite file that holds them.
        hashing: Called before a file is hashed, with its path and size in bytes.
    """

    memory: Path
    hashing: Callable[[str, int], None] = field(default=lambda path, size: None)

    def of(self, paths: Iterable[Path]) -> list[str]:
        """The SHA-256 of each file's bytes."""
        with self._opened() as known:
            return [self._one(path, known) for path in paths]

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection | None]:
        """The memory; None where it cannot be had: a full disk costs a second look at the files, and nothing else."""
        with ExitStack() as stack:
            known = None
            with suppress(OSError, sqlite3.Error):
                self.memory.parent.mkdir(parents=True, exist_ok=True)
                # Without transactions: nobody waits for another one's hashing.
                known = stack.enter_context(closing(sqlite3.connect(self.memory, timeout=60, isolation_level=None)))
                known.execute(
                    "CREATE TABLE IF NOT EXISTS files"
                    " (path TEXT PRIMARY KEY, size INT, mtime INT, ctime INT, inode INT, digest TEXT)"
                )
            yield known

    def _one(self, path: Path, known: sqlite3.Connection | None) -> str:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        where = "path=? AND size=? AND mtime=? AND ctime=? AND inode=?"
        for row in _asked(known, f"SELECT digest FROM files WHERE {where}", key):
            return str(row[0])
        self.hashing(str(path), stat.st_size)
        digest = digest_of(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:
            _asked(known, "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (*key, digest))
        return digest


def _asked(known: sqlite3.Connection | None, what: str, values: Sequence[object]) -> list[tuple[object, ...]]:
    """What the memory says; nothing where it cannot."""
    found: list[tuple[object, ...]] = []
    with suppress(sqlite3.Error):
        found += known.execute(what, values) if known is not None else ()
    return found
