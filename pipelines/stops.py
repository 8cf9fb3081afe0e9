"""A run's stop record: whoever wants a run to end writes it, from any machine, and its driver looks for it.

It stays until somebody wants the run to go on: a job that is retried by itself finds it, and leaves the run alone.
"""

from cluster import processes
from lfm.errors import LfmError
from pipelines.storage.base import Storage
from pipelines.store import canonical

ASKED = "it was asked to stop"


class RunStopped(LfmError, RuntimeError):
    """A run that somebody has stopped, and that a job would go on with by itself."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self.run = run

    def __str__(self) -> str:
        return f"Run {self.run!r}: it was stopped, expected one that is to go on. Submit it again, or use lfm resume."


def ask(storage: Storage, run: str) -> None:
    """Have a run end, and stay so."""
    storage.put_if_absent(_key(run), canonical(processes.this()))


def asked(storage: Storage, run: str) -> bool:
    """Whether somebody wants it to end."""
    return storage.read(_key(run)) is not None


def withdraw(storage: Storage, run: str) -> None:
    """Let it go on."""
    storage.delete(_key(run))


def _key(run: str) -> str:
    return f"runs/{run}/stop.json"
