"""File -> its digest, which is remembered, so that a file is hashed once while nobody changes it."""

import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
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
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        # Without transactions: nobody waits for another one's hashing.
        with closing(sqlite3.connect(self.memory, timeout=60, isolation_level=None)) as known:
            known.execute(
                "CREATE TABLE IF NOT EXISTS files"
                " (path TEXT PRIMARY KEY, size INT, mtime INT, ctime INT, inode INT, digest TEXT)"
            )
            return [self._one(path, known) for path in paths]

    def _one(self, path: Path, known: sqlite3.Connection) -> str:
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
