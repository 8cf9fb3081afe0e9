"""The verb `prepare`: any data set as one Parquet file, whole or one side of a split into train and held out."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lfm.errors import HyperparameterError
from operators.artifact import Dataset
from operators.base import operator
from operators.data.records import BATCH
from operators.data.row_files import DatasetError
from operators.data.rows import COLUMNS, SOURCE, form_of, problems_of, read_rows
from operators.workspace import Workspace

FILE = "data.parquet"
# The word before what is hashed. Sources differ in size a hundredfold: with this one, chosen among a hundred, a tenth
# of the Python corpora's sources is also about a tenth of their rows.
SPLIT = "part:"


def problems(
    *,
    data: Dataset | None,
    held_out: float = 0.1,
    max_rows: int | None = None,
    by: str | None = None,
    files: str | None = None,
    **others: object,
) -> Iterator[str]:
    """What can be told before anything runs."""
    yield from map(str, _out_of_range(held_out, max_rows))
    yield from problems_of(data, () if by is None else (by,), files=files)


def _out_of_range(held_out: float, max_rows: int | None) -> Iterator[HyperparameterError]:
    if not 0 < held_out < 1:
        yield HyperparameterError("prepare", "held_out", held_out, "0 < held_out < 1")
    if max_rows is not None and max_rows < 1:
        yield HyperparameterError("prepare", "max_rows", max_rows, "max_rows >= 1 or none")


@operator(problems=problems)
def prepare(
    work: Workspace,
    *,
    data: Dataset,
    part: Literal["all", "train", "held_out"] = "all",
    held_out: float = 0.1,
    max_rows: int | None = None,
    by: str | None = None,
    files: str | None = None,
) -> Dataset:
    """Read rows of any form and write those of one part, in the data's order and with the form's own columns.

    Rows that have the same value in the column `by` are in the same part, and which one depends on that value and on
    `held_out` alone: in two data sets split by the same column nothing held out of one is trained on in the other.

    Data that come in splits of their own, such as most of the hub's, need no `part`: one step takes ``files:
    "*train*"``, another ``files: "*test*"``.

    Args:
        work: The step's workspace.
        data: Any data set that `read_rows` reads.
        part: Which part to write.
        held_out: About this share of the values of `by` is held out; a larger share holds out the same and more.
        max_rows: At most so many rows, drawn evenly from the part; fewer of them are a subset of more.
        by: The column to split by; None takes `source` where there is one, else the row's whole content. A row
            without a value goes by its content.
        files: Which files of a folder or a hub data set, as a pattern for their paths in which ``*`` stands for
            anything. Where it is None, a folder of several splits or configurations is refused.

    Raises:
        HyperparameterError: `held_out` or `max_rows` is out of range.
        DatasetError: It cannot be read, or the part is empty.
    """
    for problem in _out_of_range(held_out, max_rows):
        raise problem
    table = read_rows(data, () if by is None else (by,), files=files)
    form = form_of(table.column_names, data.uri)
    column = by or (SOURCE if SOURCE in table.column_names else None)
    drawn: list[tuple[float, int]] = []
    characters = [0] * table.num_rows
    for i, row in enumerate(_records(table)):
        values = [row[c] for c in COLUMNS[form]]
        content = _key(values)
        group = content if column is None or row[column] is None else _key(row[column])
        if part == "all" or is_held_out(group, held_out) == (part == "held_out"):
            drawn.append((_share("row:", content), i))
            characters[i] = sum(map(_characters, values))
    if not drawn:
        what = f"none of its {table.num_rows} rows is {part} when split by {column or 'content'!r}, expected some"
        raise DatasetError(data.uri, what, "Change held_out, or split by a column of more values (by).")
    kept = {i for _, i in sorted(drawn)[:max_rows]}
    columns = [c for c in (*COLUMNS[form], SOURCE) if c in table.column_names]
    chosen = table.select(columns).filter(pa.array([i in kept for i in range(table.num_rows)]))
    folder = work.scratch / "rows"
    folder.mkdir()
    # One chunk: how the rows came in files must not show in the bytes.
    pq.write_table(chosen.combine_chunks(), folder / FILE, compression="zstd")
    about = {
        "form": form.value,
        "rows": chosen.num_rows,
        "columns": columns,
        "characters": sum(characters[i] for i in kept),
    }
    return work.save(Dataset, folder, about)


def is_held_out(value: str, share: float) -> bool:
    """Whether rows that have `value` in the column to split by are in the part of about this share of the values."""
    return _share(SPLIT, value) < share


def _records(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=BATCH):
        yield from batch.to_pylist()


def _key(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _share(word: str, key: str) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{word}{key}".encode()).digest()[:6]) / 2**48


def _characters(value: str | list[dict[str, str]]) -> int:
    return len(value) if isinstance(value, str) else sum(len(message["content"]) for message in value)
