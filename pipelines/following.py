"""A run that another process drives -> its events, as they come."""

import time
from collections.abc import Callable, Sequence

from pipelines.lineage import Event, by_driver, history, written
from pipelines.run import Watch
from pipelines.storage.base import Storage

LOOK_S = 2.0


def drivers(storage: Storage, run: str) -> list[list[Event]]:
    """The events of each driver that a run has had; none of a run that has not begun."""
    return by_driver(history(storage, run))


def follow(storage: Storage, run: str, after: int, *, watch: Watch, lives: Callable[[], bool]) -> Sequence[Event]:
    """Hand on what the drivers of a run write down, until one writes its end, or there is none.

    Args:
        storage: Where the run is.
        run: Its name.
        after: How many drivers there were whose events are no news.
        watch: Hears of the others.
        lives: Whether somebody is there, or about to be, who drives it.

    Returns:
        All of which `watch` heard.
    """
    seen: list[Event] = []
    stamp: object = None
    while True:
        over = not lives()  # before the look: what it wrote last is there then
        now = (written(storage, run), storage.list(f"runs/{run}/claims"))
        if now != stamp:
            stamp = now
            own = [event for one in drivers(storage, run)[after:] for event in one]
            watch(own[len(seen) :])
            seen = own
        if over or (seen and seen[-1].kind == "finished"):
            return seen
        time.sleep(LOOK_S)
