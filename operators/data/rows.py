"""Dataset -> rows of one of five forms, whichever files and columns they come in; images are read by `images.py`."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from lfm.errors import LfmError, UnknownName
from operators.artifact import Dataset
from operators.data.python_corpus import CORPORA, PYTHON, corpus
from operators.data.records import BATCH, header, records
from operators.data.row_files import DatasetError, files_of

SOURCE = "source"


class Form(StrEnum):
    """What a row is."""

    TEXT = "text"
    PROMPT_COMPLETION = "prompt_completion"
    CONVERSATION = "conversation"
    LABELLED = "labelled"
    IMAGE = "image"


COLUMNS: Mapping[Form, tuple[str, ...]] = {
    Form.TEXT: ("text",),
    Form.PROMPT_COMPLETION: ("prompt", "completion"),
    Form.CONVERSATION: ("messages",),
    Form.LABELLED: ("text", "label"),
    Form.IMAGE: ("image", "label"),
}
"""The columns of each form, as `read_rows` gives them."""
SPOKEN = (Form.TEXT, Form.PROMPT_COMPLETION, Form.CONVERSATION)
"""The forms of which a language model says every word."""
OF_TEXT = (*SPOKEN, Form.LABELLED)
"""The forms that `read_rows` reads."""

# In this order: where rows come in two forms at once, `text` is the other one rendered.
RECOGNISED = (
    (("messages",), Form.CONVERSATION),
    (("prompt", "completion"), Form.PROMPT_COMPLETION),
    (("instruction", "output"), Form.PROMPT_COMPLETION),  # as Alpaca has it, with an optional `input`
    (("text", "label"), Form.LABELLED),
    (("image", "label"), Form.IMAGE),
    (("text",), Form.TEXT),
)
WANTED = (
    "'messages', or 'prompt' and 'completion', or 'instruction' and 'output', or 'text' alone or with 'label', "
    "or 'image' and 'label'"
)
READ = ("messages", "prompt", "completion", "instruction", "input", "output", "text", "label")
ALLOWED: Mapping[type, str] = {
    str: "a string",
    list: "a list of messages, each with a string as 'role' and as 'content', without tool calls and of weight 1",
}
TYPES: Mapping[type, Any] = {
    str: pa.string(),
    list: pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
}


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


def columns_of(uri: str | Path, *, files: str | None = None) -> tuple[str, ...]:
    """The columns of a local data set or a ``python://`` corpus, from headers only.

    These are the Parquet schema or the keys of the first row of JSON, of the first file that has one.

    Args:
        uri: Where it is.
        files: Which files of a folder, as in `read_rows`.

    Raises:
        DatasetError: There is no such data set, or it has no rows.
        UnknownName: Python has no such corpus.
    """
    return _headers(str(uri), files)[0]


def problems_of(dataset: Dataset | None, columns: Sequence[str] = (), *, files: str | None = None) -> Iterator[str]:
    """What headers alone tell is wrong with a data set, a clause each; nothing of one that cannot be looked at yet.

    Args:
        dataset: The same as `read_rows` takes.
        columns: What it has to have besides those of its form.
        files: The same as `read_rows` takes.
    """
    if dataset is None:
        return
    try:
        known, opened = _headers(dataset.uri, files)
    except LfmError as problem:
        yield str(problem)
        return
    yield from map(str, _unknown(dataset.uri, known, columns))
    try:
        for file in opened:
            check_form(file, form_of(known, str(opened[0])), opened[0])
    except DatasetError as problem:
        yield str(problem)


def read_rows(
    dataset: Dataset,
    columns: Sequence[str] = (),
    *,
    files: str | None = None,
    forms: Collection[Form] = OF_TEXT,
) -> pa.Table:
    """All rows of a data set with the columns of its form, those asked for and, where there is one, `source`.

    Text is a string, messages are a list of role and content, a prompt and a completion are either. A label is a
    string; of data that number their labels it is the number in digits. Every other column is a string too: its value
    as JSON where it is none. A folder's files are read in the order of their names.

    Args:
        dataset: Parquet, JSON lines or an array (gzipped or not), a folder of such files, or ``python://`` and a
            corpus's name.
        columns: What to keep besides.
        files: A pattern for the paths of a folder's files, in which ``*`` stands for anything. Without one, a folder
            whose files are named as several splits or configurations is refused: they are not to be mixed.
        forms: What rows may be; of text.

    Raises:
        DatasetError: It is not there, cannot be read, has no rows, is of another form, or has a row that is not of
            its own.
        UnknownName: It has no such column, or Python no such corpus.
    """
    form, known, opened = opened_as(dataset, forms, files=files)
    for problem in _unknown(dataset.uri, known, columns):
        raise problem
    if not opened:
        table = pa.table(corpus(dataset.uri.removeprefix(PYTHON)))
    else:
        besides = [c for c in dict.fromkeys((SOURCE, *columns)) if c in known and c not in COLUMNS[form]]
        table = _table(opened, form, besides)
    if not table.num_rows:
        raise empty(dataset.uri)
    return table


def opened_as(
    dataset: Dataset, forms: Collection[Form], *, files: str | None = None
) -> tuple[Form, tuple[str, ...], list[Path]]:
    """What a data set's rows are, its columns, and the files that have rows, of which Python's corpora have none.

    Raises:
        DatasetError: It is not there, has no rows, or is of none of these forms.
        UnknownName: Python has no such corpus.
    """
    known, opened = _headers(dataset.uri, files)
    if (form := form_of(known, str(opened[0]) if opened else dataset.uri)) not in forms:
        raise DatasetError(dataset.uri, *other_form(form, forms))
    return form, known, opened


def digest_of(rows: Mapping[str, Sequence[Any]]) -> str:
    """Of what rows ask and expect, so that two results can be known to be about the same documents."""
    columns = [rows[column] for column in COLUMNS[form_of(tuple(rows))]]
    return hashlib.sha256(json.dumps(list(zip(*columns, strict=True))).encode()).hexdigest()


def other_form(form: Form, wanted: Collection[Form]) -> tuple[str, str]:
    """What is wrong with rows of a form that is none of those that are wanted, and what to do about it."""
    columns = " or ".join(" and ".join(map(repr, COLUMNS[f])) for f in wanted)
    return f"holds {form.value!r} rows, expected the columns {columns}", "Give others."


def _headers(uri: str, pattern: str | None) -> tuple[tuple[str, ...], list[Path]]:
    """The columns, and the files that have rows; no files of a corpus of Python."""
    if uri.startswith(PYTHON):
        name = uri.removeprefix(PYTHON)
        if name not in CORPORA:
            raise UnknownName("corpus of Python", name, tuple(CORPORA))
        if pattern is not None:
            raise DatasetError(
                uri, f"has no files, expected a folder to choose files={pattern!r} from", "Leave it out."
            )
        return CORPORA[name], []
    opened = files_of(Path(uri), pattern)
    for i, file in enumerate(opened):
        columns = header(file)
        if columns:
            return columns, opened[i:]
    raise empty(uri)


def _unknown(uri: str, known: tuple[str, ...], columns: Sequence[str]) -> Iterator[UnknownName]:
    return (UnknownName(f"column of {uri!r}", c, known) for c in columns if c not in known)


def check_form(file: Path, form: Form, first: Path) -> None:
    """Raise `DatasetError` where a file's rows are not of the form that those of the first one have."""
    columns = header(file)
    if columns and (other := form_of(columns, str(file))) != form:
        what = f"holds rows of the form {other.value!r}, expected {form.value!r} as in {first.name!r}"
        raise DatasetError(str(file), what, "Keep files of one form in a folder, or choose some of them (files).")


def _table(files: Sequence[Path], form: Form, besides: Sequence[str]) -> pa.Table:
    kinds: dict[str, type] = {
        "text": str,
        "label": str,
        "messages": list,
    }  # a prompt's and a completion's is the first row's
    rows = _rows(files, form, besides, kinds)
    batches: list[Any] = []
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
        check_form(file, form, files[0])
        for where, record in records(file, {*READ, *besides}):
            row = record
            if form is Form.PROMPT_COMPLETION and "instruction" in record and "prompt" not in record:
                row = {**record, **_from_instruction(record, where)}
            own = {column: _value(row, column, kinds, where) for column in COLUMNS[form]}
            yield own | {column: _text(record.get(column), column, where) for column in besides}


def _from_instruction(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Alpaca's columns as prompt and completion."""
    kinds: dict[str, type] = {"instruction": str, "output": str, "input": str}
    prompt, completion = (_value(record, c, kinds, where) for c in ("instruction", "output"))
    more = _value(record, "input", kinds, where) if record.get("input") is not None else ""
    return {"prompt": f"{prompt}\n\n{more}" if more else prompt, "completion": completion}


def _value(record: Mapping[str, Any], column: str, kinds: dict[str, type], where: str) -> Any:
    value = record.get(column)
    if column == "label" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    kind = kinds.setdefault(column, list if isinstance(value, list) else str)
    if kind is str and isinstance(value, str):
        return _encodable(value, column, where)
    if kind is list and isinstance(value, list) and value and all(map(_is_message, value)):
        return [{k: _encodable(message[k], column, where) for k in ("role", "content")} for message in value]
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
    what = f"{column!r} is {shown if column in record else 'missing'}, expected {ALLOWED[kind]}"
    raise DatasetError(where, what, "Correct the row or remove it.")


def _is_message(value: object) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(k), str) for k in ("role", "content")):
        return False
    # Left out silently, these would make another conversation of it.
    return not (value.get("tool_calls") or value.get("function_call")) and value.get("weight") in (None, 1)


def _encodable(value: str, column: str, where: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            what = f"{column!r} holds half a character ({half!r}), expected whole ones"
            raise DatasetError(where, what, "Correct the row or remove it.") from error
    return value


def _text(value: object, column: str, where: str) -> str | None:
    if isinstance(value, str):
        return _encodable(value, column, where)
    return None if value is None else json.dumps(value, sort_keys=True, default=str)


def empty(uri: str) -> DatasetError:
    """What is said of a data set without rows."""
    return DatasetError(uri, "has no rows, expected at least one", "Give a data set with something in it.")
