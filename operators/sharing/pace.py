"""How often what a step has done so far is kept."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL_S, PATIENCE = 60.0, 50  # between two checkpoints at least: so long, and so many times what keeping one takes


class Pace:
    """When a checkpoint is due: after so many steps, or after so long that keeping one takes little of the time."""

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self.took, self.since = 0.0, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to keep one after a step, counted from 1."""
        if self.every is not None:
            return self.every > 0 and step % self.every == 0
        return time.monotonic() - self.since >= max(INTERVAL_S, PATIENCE * self.took)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around the keeping of one."""
        began = time.monotonic()
        yield
        self.since = time.monotonic()
        self.took = self.since - began
