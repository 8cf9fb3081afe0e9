"""Rows -> a file of JSON lines."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def kept(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows; a file that says the same already stays as it is, so that nobody has to look at it again."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
