"""What can be measured of a model, document by document, and the files that hold it."""

from collections.abc import Callable
from typing import Any, Protocol

SUMMARY, DOCUMENTS = "metrics.json", "documents.parquet"
"""The means by set, and every document's own numbers."""


class Measure(Protocol):
    """What can be measured of one kind of model, on one kind of rows."""

    def work(self, rows: Any) -> int:
        """How many times it tells of a row that it is done."""

    def digest(self, rows: Any) -> str:
        """Of what rows ask and expect, so that two results can be known to be about the same documents."""

    def measured(self, name: str, rows: Any, told: Callable[..., None]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """A set's numbers for each document, and their means."""
