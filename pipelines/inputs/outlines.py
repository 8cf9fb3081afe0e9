"""Files that lie elsewhere -> a folder here with their headers, so that a plan looks at them before they are fetched.

A file of weights has its header, a Parquet file its footer, and zeros for all else, which take no room on a disk; of
JSON lines only the first ones are there. Configs and tokenizers are whole.
"""

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from operators.data.row_files import JSON, PARQUET
from pipelines.storage.base import at_once, below, cache, remove

Read = Callable[[str, int, int], bytes]
"""The bytes of a file, by its name, from one place up to before another."""

FIRST = 1 << 19  # bytes that are asked for at once: most headers are shorter
HEADER = 100_000_000  # the most that safetensors lets a header have
# Of more nothing is known before it is fetched: so many files, and bytes of those that only the whole tells something.
FILES = 64
WHOLE = 1 << 26  # tokenizers reach 40 MB


@dataclass(frozen=True, slots=True)
class Piece:
    """What is known of a file: some bytes, where they begin, and how long the file is shown to be."""

    start: int
    data: bytes
    size: int


def outline(name: str, sizes: Mapping[str, int], read: Read) -> Path | None:
    """A folder in this user's cache with the headers of some files, or None where they cannot be told from a part.

    Args:
        name: Of the files' content: what has the same name is looked at once. It is part of the folder's path, and so
            of what messages say about the files.
        sizes: The files' bytes by their names.
        read: How to get at them.
    """
    target = cache() / "outlines" / name
    if target.is_dir():
        return target
    if len(sizes) > FILES or sum(size for file, size in sizes.items() if not _in_part(file)) > WHOLE:
        return None
    pieces = at_once(lambda file: piece(file, sizes[file], read), sizes)
    folder = target.with_name(f".{uuid.uuid4().hex}")
    folder.mkdir(parents=True)
    try:
        for file, one in zip(sizes, pieces, strict=True):
            if one is None:
                return None
            _write(below(folder, file, name), one)
        try:
            os.rename(folder, target)
        except OSError:  # somebody else has made it meanwhile
            if not target.is_dir():
                raise
    finally:
        remove(folder)
    return target


def piece(name: str, size: int, read: Read) -> Piece | None:
    """The part of a file that says what is in it; None of lines that are too long."""
    if name.endswith(".safetensors"):
        data = read(name, 0, min(size, FIRST))
        length = min(size, 8 + int.from_bytes(data[:8], "little"), HEADER)
        return Piece(0, data if length <= len(data) else read(name, 0, length), size)
    if name.endswith(PARQUET):
        start = max(0, size - FIRST)
        data = read(name, start, size)
        begin = max(0, size - 8 - int.from_bytes(data[-8:-4], "little"))
        return Piece(start, data, size) if start <= begin else Piece(begin, read(name, begin, size), size)
    if name.endswith(JSON[0]) and size > FIRST:
        lines = read(name, 0, FIRST).rpartition(b"\n")[0]
        return Piece(0, lines, len(lines)) if lines else None
    return Piece(0, read(name, 0, size), size)


def _in_part(name: str) -> bool:
    return name.endswith((".safetensors", *PARQUET, JSON[0]))


def _write(path: Path, one: Piece) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.seek(one.start)
        file.write(one.data)
        file.truncate(one.size)
