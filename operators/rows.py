"""Dataset -> rows of one of three forms, whichever files and columns they come in."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from lfm.errors import LfmError, UnknownName
from operators.artifact import Dataset
from operators.python_corpus import CORPORA, corpus

PYTHON = "python://"
PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
# What hub folders and this project's store keep beside the rows.
NO_ROWS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "manifest.json", "state.json"}
SOURCE = "source"
BATCH = 4096  # rows that exist as Python objects at once


class Form(StrEnum):
    """What a row is."""

    TEXT = "text"
    PROMPT_COMPLETION = "prompt_completion"
    CONVERSATION = "conversation"


COLUMNS: Mapping[Form, tuple[str, ...]] = {
    Form.TEXT: ("text",),
    Form.PROMPT_COMPLETION: ("prompt", "completion"),
    Form.CONVERSATION: ("messages",),
}
"""The columns of each form, as `read_rows` gives them."""

# In this order: where rows come in two forms at once, `text` is the other one rendered.
RECOGNISED = (
    (("messages",), Form.CONVERSATION),
    (("prompt", "completion"), Form.PROMPT_COMPLETION),
    (("instruction", "output"), Form.PROMPT_COMPLETION),  # as Alpaca has it, with an optional `input`
    (("text",), Form.TEXT),
)
WANTED = "'messages', or 'prompt' and 'completion', or 'instruction' and 'output', or 'text'"
READ = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
ALLOWED = {str: "a string", list: "a list of messages, each with a string as 'role' and as 'content'"}
TYPES = {str: pa.string(), list: pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))}


class DatasetError(LfmError, ValueError):
    """Data that cannot be read, or that is not what its reader needs."""

    def __init__(self, uri: str, what: str, fix: str) -> None:
        super().__init__(uri, what, fix)
        self.uri, self.what, self.fix = uri, what, fix

    def __str__(self) -> str:
        return f"{self.uri}: {self.what}. {self.fix}"


def form_of(columns: Sequence[str], uri: str = "dataset") -> Form:
    """What rows with such columns are.

    Raises:
        DatasetError: None of the forms.
    """
    for wanted, form in RECOGNISED:
        if set(wanted) <= set(columns):
            return form
    found = ", ".join(map(repr, columns)) or "none"
    raise DatasetError(uri, f"has the columns {found}, expected {WANTED}", "Rename the columns.")


def columns_of(uri: str | Path) -> tuple[str, ...]:
    """The columns of a local data set or a ``python://`` corpus, from headers only.

    These are the Parquet schema or the keys of the first line of JSON, of the first file that has one.

    Raises:
        DatasetError: There is no such data set, or it has no rows.
    """
    if str(uri).startswith(PYTHON):
        name = str(uri).removeprefix(PYTHON)
        if name not in CORPORA:
            raise UnknownName("corpus of Python", name, tuple(CORPORA))
        return CORPORA[name]
    for file in _files(Path(uri)):
        columns = _header(file)
        if columns:
            return columns
    raise _empty(str(uri))


def read_rows(dataset: Dataset, columns: Sequence[str] = ()) -> pa.Table:
    """All rows of a data set with the columns of its form, those asked for and, where there is one, `source`.

    Text is a string, messages are a list of role and content, a prompt and a completion are either. Every other
    column is a string too: its value as JSON where it is none. A folder's files are read in the order of their names.

    Args:
        dataset: Parquet, JSONL (gzipped or not), a folder of such files, or ``python://`` and a corpus's name.
        columns: What to keep besides.

    Raises:
        DatasetError: It is not there, cannot be read, has no rows, or has one that is not of its form.
        UnknownName: It has no such column.
    """
    known = columns_of(dataset.uri)
    unknown = [c for c in columns if c not in known]
    if unknown:
        raise UnknownName(f"column of {dataset.uri!r}", unknown[0], known)
    if dataset.uri.startswith(PYTHON):
        table = pa.table(corpus(dataset.uri.removeprefix(PYTHON)))
    else:
        form = form_of(known, dataset.uri)
        besides = [c for c in dict.fromkeys((SOURCE, *columns)) if c in known and c not in COLUMNS[form]]
        table = _table(_files(dataset.path), form, besides)
    if not table.num_rows:
        raise _empty(dataset.uri)
    return table


def _table(files: Sequence[Path], form: Form, besides: Sequence[str]) -> pa.Table:
    kinds: dict[str, type] = {"text": str, "messages": list}  # a prompt's and a completion's is the first row's
    rows = _rows(files, form, besides, kinds)
    batches = []
    schema = pa.schema([])
    while chunk := list(islice(rows, BATCH)):
        if not batches:
            own = [(c, TYPES[kinds[c]]) for c in COLUMNS[form]]
            schema = pa.schema([*own, *((c, pa.string()) for c in besides)])
        batches.append(pa.RecordBatch.from_pylist(chunk, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def _rows(
    files: Sequence[Path], form: Form, besides: Sequence[str], kinds: dict[str, type]
) -> Iterator[dict[str, Any]]:
    for file in files:
        header = _header(file)
        if header and form_of(header, str(file)) != form:
            found = f"holds rows of the form {form_of(header).value!r}, expected {form.value!r} as in {files[0].name!r}"
            raise DatasetError(str(file), found, "Keep files of one form in a folder.")
        for where, record in _records(file, {*READ, *besides}):
            if form is Form.PROMPT_COMPLETION and "instruction" in record and "prompt" not in record:
                record = {**record, **_from_instruction(record, where)}
            row = {column: _value(record, column, kinds, where) for column in COLUMNS[form]}
            yield row | {column: _text(record.get(column)) for column in besides}


def _from_instruction(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Alpaca's columns as prompt and completion."""
    kinds: dict[str, type] = {"instruction": str, "output": str, "input": str}
    prompt, completion = (_value(record, c, kinds, where) for c in ("instruction", "output"))
    more = _value(record, "input", kinds, where) if record.get("input") is not None else ""
    return {"prompt": f"{prompt}\n\n{more}" if more else prompt, "completion": completion}


def _value(record: Mapping[str, Any], column: str, kinds: dict[str, type], where: str) -> Any:
    value = record.get(column)
    kind = kinds.setdefault(column, list if isinstance(value, list) else str)
    if kind is str and isinstance(value, str):
        return _encodable(value, column, where)
    if kind is list and isinstance(value, list) and value and all(map(_is_message, value)):
        return [{k: _encodable(message[k], column, where) for k in ("role", "content")} for message in value]
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
    what = f"{column!r} is {shown if column in record else 'missing'}, expected {ALLOWED[kind]}"
    raise DatasetError(where, what, "Correct the row or remove it.")


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(k), str) for k in ("role", "content"))


def _encodable(value: str, column: str, where: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            what = f"{column!r} holds half a character ({half!r}), expected whole ones"
            raise DatasetError(where, what, "Correct the row or remove it.") from error
    return value


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _files(path: Path) -> list[Path]:
    """The files of a data set in the order of their names."""
    if not path.exists():
        raise DatasetError(str(path), "is not there, expected a file or folder of rows", "Check the path.")
    ends = (*PARQUET, *JSON_LINES)
    if path.is_file():
        if not path.name.endswith(ends):
            raise DatasetError(str(path), f"ends in {path.suffix!r}, expected {', '.join(ends)}", "Convert the file.")
        return [path]
    inside = sorted((p.relative_to(path) for p in path.rglob("*")), key=Path.as_posix)
    seen = [p for p in inside if not any(part.startswith(".") for part in p.parts) and p.name not in NO_ROWS]
    files = [path / p for p in seen if p.name.endswith(ends) and (path / p).is_file()]
    if not files:
        raise DatasetError(str(path), f"holds no file of rows, expected {', '.join(ends)}", "Check the path.")
    return files


def _header(file: Path) -> tuple[str, ...]:
    """The columns that a file names first; none where it is an empty file of JSON lines."""
    if file.name.endswith(PARQUET):
        with _reading(file):
            return tuple(pq.read_schema(file).names)
    return next((tuple(record) for _, record in _json_records(file)), ())


def _records(file: Path, columns: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a file, with where it is."""
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
    with _reading(file), _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", _record(line, f"{file}:{number}")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"is no JSON ({error.msg} at column {error.colno}), expected one object per line"
        raise DatasetError(where, what, "Correct the line or remove it.") from error
    if not isinstance(record, dict):
        what = f"is a {type(record).__name__}, expected one object per line"
        raise DatasetError(where, what, "Write each row on a line of its own.")
    return record


def _opened(file: Path) -> TextIO:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig")  # -sig: some editors begin a file with a mark
    return file.open(encoding="utf-8-sig")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Name the file in what goes wrong while it is read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        wanted = "Parquet" if file.name.endswith(PARQUET) else "JSON lines in UTF-8"
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
        what = f"cannot be read ({reason}), expected {wanted}"
        raise DatasetError(str(file), what, "Write the file again, or give one that is whole.") from error


def _empty(uri: str) -> DatasetError:
    return DatasetError(uri, "has no rows, expected at least one", "Give a data set with something in it.")
