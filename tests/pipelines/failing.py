"""Stand-ins that fail as they are told to: a storage of which one call is refused, and what a driver runs steps on."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from cluster.capacity import Capacity, Node
from cluster.pool import Began, Ended, Handle, Pool
from pipelines import attempts, run
from pipelines.leases import Leases
from pipelines.ledger import Turns
from pipelines.storage.base import named

WRITES = ("put_if_absent", "replace_if_match", "adopt", "discard", "delete", "append", "scratch")
READS = ("read", "list", "entries", "folders", "fetch")


@dataclass
class FailingStorage:
    """A storage whose calls are counted, and some of them refused.

    Attributes:
        storage: What does the others.
        verbs: The calls that count.
        number: Which of them fails, counted from 1; 0 for none.
        error: With which error of the operating system.
        after: Whether it has done what was asked, and only the answer got lost.
        lasting: Whether every later one fails too, as on a full disk.
        calls: The calls that were counted, each as ``(verb, key)``.
    """

    storage: Any
    verbs: tuple[str, ...] = WRITES
    number: int = 0
    error: int = 0
    after: bool = False
    lasting: bool = False
    calls: list[tuple[str, str]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.storage, name)
        return partial(self._call, name, found) if name in self.verbs else found

    def _call(self, verb: str, act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        key = next((str(a) for a in (arguments[1:] if verb == "adopt" else arguments)), "")
        self.calls.append((verb, key))
        number = len(self.calls)
        refused = self.number and (number >= self.number if self.lasting else number == self.number)
        done = self.after and verb != "scratch"  # of a folder on this machine no answer gets lost
        answer = act(*arguments, **options) if done or not refused else None
        if refused:
            with named(f"store {key!r}"):
                raise OSError(self.error, os.strerror(self.error))
        return answer

    @property
    def refused(self) -> tuple[str, str] | None:
        """The first call that failed, if one has."""
        return self.calls[self.number - 1] if 0 < self.number <= len(self.calls) else None


class Livelock(AssertionError):
    """A driver that has asked far more often than anything could happen."""


class Clock:
    """A clock that moves when somebody sleeps; `passed` hears of it."""

    MOST = 5000

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.passed: Callable[[], None] = lambda: None
        self._asked = 0

    def sleep(self, seconds: float) -> None:
        self._asked += 1
        if self._asked > self.MOST:
            raise Livelock(self._asked)
        self.now += seconds
        self.passed()

    def monotonic(self) -> float:
        return self.now

    time = monotonic


class FakePool(Pool):
    """A cluster in this process: a task is done while its driver listens, one after the other in any order.

    Attributes:
        clock: Moves while a driver listens in vain.
        started: Hears of each task that is handed over.
        choose: Which of the open tasks goes on next.
        end: What comes of one, given the function, the task and the node; nothing where it goes on.
        name: What it is called, where others use it too.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        started: Callable[[Any], None] = lambda task: None,
        choose: Callable[[Sequence[Any]], Any] = lambda open_: open_[0],
        end: Callable[[Callable[[Any], Any], Any, str], Any] = lambda act, task, node: act(task),
        name: str = "",
    ) -> None:
        self.clock, self.started, self.choose, self.end_of, self.name = clock, started, choose, end, name
        self.open: dict[int, tuple[Callable[[Any], Any], Any]] = {}
        self.began: set[int] = set()
        self.gone: set[str] = set()
        self._last = 0

    def capacity(self) -> Capacity:
        return Capacity(cpus=8, gpus=0)

    def living(self) -> Capacity:
        return Capacity.of([Node(cpus=8)])

    grows = False

    def shared(self) -> str:
        return self.name

    def leaving(self) -> frozenset[str]:
        return frozenset(self.gone)

    def start(self, act: Callable[[Any], Any], task: Any, **asked: Any) -> Handle:
        self.started(task)
        self._last += 1
        self.open[self._last] = (act, task)
        return self._last

    def heard(self, handles: Sequence[Handle], timeout: float) -> list[Began | Ended]:
        self.clock.sleep(timeout)
        handle = self.choose(sorted(self.open))
        if handle not in self.began:
            self.began.add(handle)
            return [Began(handle, f"node-{handle}")]
        act, task = self.open[handle]
        answer = self.end_of(act, task, f"node-{handle}")
        if answer is None:
            return []
        del self.open[handle]
        return [Ended(handle, error=answer) if isinstance(answer, BaseException) else Ended(handle, answer)]


@contextmanager
def fast(clock: Clock) -> Iterator[None]:
    """Have drivers live by `clock`, and no disk be waited for."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "time", clock)
        patched.setattr(attempts, "time", clock)
        patched.setattr(run, "Leases", partial(Leases, clock=clock.monotonic))
        patched.setattr(run, "Turns", partial(Turns, clock=clock.monotonic))
        patched.setattr(os, "fsync", lambda handle: None)
        yield
