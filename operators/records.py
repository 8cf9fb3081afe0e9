"""Files of Parquet or JSON -> records, each with where it is."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lfm.errors import LfmError

PARQUET = (".parquet",)
JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
# What hub folders and this project's store keep beside the rows.
NO_ROWS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "manifest.json", "state.json"}
BATCH = 4096  # rows that exist as Python objects at once

# Words in the names of files and folders by which data say what they are for: not to be mixed.
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing"}
NUMBER = re.compile(r"[-_.]?\d+(-of-\d+.*)?$")  # of one file of several, as in ``train-00000-of-00003-1a2b``


class DatasetError(LfmError, ValueError):
    """Data that cannot be read, or that is not what its reader needs."""

    def __init__(self, where: str, what: str, fix: str) -> None:
        super().__init__(where, what, fix)
        self.where, self.what, self.fix = where, what, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.fix}"


def files_of(path: Path, pattern: str | None = None) -> list[Path]:
    """The files of a data set in the order of their paths; hidden ones are no part of it.

    Args:
        path: A file, or a folder of files.
        pattern: Which files of a folder; without one they have to be of one part, all training data or all test data.

    Raises:
        DatasetError: There is none, or they are of several parts.
    """
    ends = ", ".join((*PARQUET, *JSON))
    if not path.exists():
        raise DatasetError(str(path), "is not there, expected a file or folder of rows", "Check the path.")
    if path.is_file():
        if pattern is not None:
            what = f"is a file, expected a folder to choose files={pattern!r} from"
            raise DatasetError(str(path), what, "Leave files out.")
        if not path.name.endswith((*PARQUET, *JSON)):
            raise DatasetError(str(path), f"ends in {path.suffix!r}, expected {ends}", "Convert the file.")
        return [path]
    inside = sorted((p.relative_to(path) for p in path.rglob("*")), key=PurePath.as_posix)
    found = [p for p in inside if may_hold_rows(p) and (path / p).is_file()]
    if not found:
        raise DatasetError(str(path), f"holds no file of rows, expected {ends}", "Check the path.")
    chosen = [p for p in found if pattern is None or fnmatchcase(p.as_posix(), pattern)]
    if not chosen:
        what = f"holds no file that matches files={pattern!r}, expected one of {_listed([p.as_posix() for p in found])}"
        raise DatasetError(str(path), what, "Correct the pattern.")
    parts = list(dict.fromkeys(map(_part, chosen)))
    if pattern is None and len(parts) > 1:
        what = f"holds {_listed([p or 'other files' for p in parts])}, expected one of them"
        named = min(filter(None, parts), key=lambda part: "train" not in part)
        raise DatasetError(str(path), what, f"Choose with prepare's files, such as files: '{named}*'.")
    return [path / p for p in chosen]


def may_hold_rows(path: PurePath) -> bool:
    """Whether a file of a data set, by its path in it, is one of rows and not hidden."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name not in NO_ROWS and path.name.endswith((*PARQUET, *JSON))


def _part(path: PurePath) -> str:
    """What a path says of the part of the data that is there, such as ``main/train``; empty where it says nothing."""
    *folders, name = path.parts
    stem = NUMBER.sub("", name[: name.index(".")])
    for depth, word in reversed([*enumerate(folders), (len(folders), stem)]):
        if SPLITS & set(re.split(r"[^a-z]+", word.casefold())):
            return "/".join([*folders[:depth], word])
    return ""


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(map(repr, names[:6]))
    return few if len(names) <= 6 else f"{few} and {len(names) - 6} more"


def header(file: Path) -> tuple[str, ...]:
    """The columns that a file names first; none where it has no rows.

    Raises:
        DatasetError: It cannot be read.
    """
    if file.name.endswith(PARQUET):
        with _reading(file):
            found = pq.read_metadata(file)
            return tuple(found.schema.to_arrow_schema().names) if found.num_rows else ()
    return next((tuple(record) for _, record in _json_records(file)), ())


def records(file: Path, columns: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a file, with where it is; of Parquet only `columns`.

    Raises:
        DatasetError: It cannot be read.
    """
    return _parquet_records(file, columns) if file.name.endswith(PARQUET) else _json_records(file)


def _parquet_records(file: Path, columns: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with _reading(file), pq.ParquetFile(file) as opened:
        named = [c for c in opened.schema_arrow.names if c in columns]
        for batch in opened.iter_batches(batch_size=BATCH, columns=named):
            for record in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", record


def _json_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One object per line, or one array of objects."""
    with _reading(file), _opened(file) as lines:
        first = True
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            text = _decoded(line, where, first=number == 1)
            if first and text.lstrip().startswith("["):
                rest = _decoded(lines.read(), f"{file}:{number + 1}", first=False)
                yield from _array(text + rest, file, number)
                return
            if text.strip():
                first = False
                yield where, _object(_parsed(text, file, number), where)


def _array(text: str, file: Path, line: int) -> Iterator[tuple[str, dict[str, Any]]]:
    found = _parsed(text, file, line)
    for number, value in enumerate(found, start=1):
        yield f"{file} row {number}", _object(value, f"{file} row {number}")


def _parsed(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text.rstrip())  # else what is missing at its end is missing on the next line
    except json.JSONDecodeError as error:
        what = f"is no JSON ({error.msg} at column {error.colno}), expected one object per line, or one array of them"
        raise DatasetError(f"{file}:{line + error.lineno - 1}", what, "Correct the line or remove it.") from error
    except RecursionError as error:
        raise DatasetError(f"{file}:{line}", "is nested too deeply, expected a row", "Remove it.") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        what = f"is a {type(value).__name__}, expected an object with the row's columns"
        raise DatasetError(where, what, "Write each row as an object of its own.")
    return value


def _decoded(line: bytes, where: str, *, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")  # -sig: some editors begin a file with a mark
    except UnicodeDecodeError as error:
        what = f"is no UTF-8 ({error.reason} at byte {error.start + 1}), expected JSON in it"
        raise DatasetError(where, what, "Convert the file.") from error


def _opened(file: Path) -> BinaryIO:
    if file.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(file, "rb"))
    return file.open("rb")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Name the file in what goes wrong while it is read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        wanted = "Parquet" if file.name.endswith(PARQUET) else "JSON"
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
        what = f"cannot be read ({reason}), expected {wanted}"
        raise DatasetError(str(file), what, "Write the file again, or give one that is whole.") from error
