"""How many workers share a step's work since when: its process writes it down, and its driver makes events of it."""

import json
from collections.abc import Iterable
from contextlib import suppress

from pipelines.execute import Task
from pipelines.lineage import Event
from pipelines.storage.base import Storage, StorageFailed


class Groups:
    """What a driver has heard of the steps whose number of workers may change."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._heard: dict[str, int] = {}  # lines, by key

    def news(self, tasks: Iterable[Task]) -> list[Event]:
        """The changes since the last time, in order; what storage does not say now it says the next time."""
        events = []
        for task in tasks:
            if task.resources.elastic:
                lines = self._lines(task.groups)
                events += [Event("workers", task.step, {**json.loads(line), "attempt": task.attempt}) for line in lines]
        return events

    def _lines(self, key: str) -> list[bytes]:
        lines: list[bytes] = []
        with suppress(StorageFailed):
            written = [line for line in (self._storage.read(key) or b"").splitlines() if line.endswith(b"}")]
            lines = written[self._heard.get(key, 0) :]
            self._heard[key] = len(written)
        return lines
