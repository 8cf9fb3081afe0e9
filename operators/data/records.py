"""Files of Parquet or JSON -> records, each with where it is."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from operators.data.row_files import PARQUET, DatasetError

EXTENSION = b"ARROW:extension:name"
PICKLED = "arrow.py_extension_type"  # how Arrow once stored a type of Python's, as a pickle
BATCH = 4096  # rows that exist as Python objects at once


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
        check_types(file, [opened.schema_arrow.field(c) for c in named])
        for batch in opened.iter_batches(batch_size=BATCH, columns=named):
            for record in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", record


def check_types(file: Path, columns: Iterable[pa.Field]) -> None:
    """Refuse columns of a type that a library brings: Ray's for Python objects unpickles what the file holds.

    Raises:
        DatasetError: There is one.
    """
    for column in columns:
        _check_type(file, column)


def _check_type(file: Path, field: pa.Field) -> None:
    kind = field.type
    name = kind.extension_name if isinstance(kind, pa.BaseExtensionType) else (field.metadata or {}).get(EXTENSION, b"")
    name = name.decode(errors="replace") if isinstance(name, bytes) else name
    if name and (not name.startswith("arrow.") or name == PICKLED):
        what = f"has the column {field.name!r} of the extension type {name!r}, expected a type of Arrow's own"
        raise DatasetError(str(file), what, "Write it as plain strings, numbers, lists and structs.")
    check_types(file, [kind.field(i) for i in range(kind.num_fields)])


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
