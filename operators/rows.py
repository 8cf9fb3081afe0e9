"""A dataset's files -> rows."""

import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from operators.artifact import Dataset


def read_rows(dataset: Dataset) -> pa.Table:
    """All rows of a dataset."""
    path = dataset.path
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".parquet", ".jsonl"))
    return pa.concat_tables([pq.read_table(f) if f.suffix == ".parquet" else pj.read_json(f) for f in files])
