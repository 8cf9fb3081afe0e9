"""Who does the pieces of a large piece of work: threads of this process, or Ray tasks with threads of their own."""

import functools
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from operators.code import Code, bring, brought
from operators.resources import Resources
from operators.sharing.heap import keep
from operators.sharing.notices import FolderNotShared, Notices, lost_with, nodes

BUNDLES = 4  # for each task: the last ones to end then wait for a quarter of one's work at most


class Worker(Protocol):
    """What does pieces, in any process; they are known by their numbers."""

    def do(self, act: str, number: int, found: Mapping[str, Tensor]) -> Tensor | None:
        """Do one piece of what `act` names, with what is known so far; its result is added to that of the others."""

    def bytes(self, act: str, number: int) -> int:
        """The most that this takes while it is done."""


class Tally:
    """A sum that does not depend on who adds to it when: integers are exact, all else waits for its turn."""

    def __init__(self) -> None:
        self.exact: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def add(self, number: int, part: Tensor | None) -> None:
        """Take in the result of one piece."""
        if part is not None and part.is_floating_point():
            self.waiting[number] = part
        elif part is not None:
            self.exact = part if self.exact is None else self.exact + part

    def take(self, other: "Tally") -> None:
        """Take in all that another one has."""
        self.add(-1, other.exact)
        self.waiting |= other.waiting

    def total(self) -> Tensor | None:
        """The sum; None of nothing."""
        total = self.exact
        for _, part in sorted(self.waiting.items(), key=lambda entry: entry[0]):
            total = part if total is None else total + part
        return total


Done = tuple[list[int], Tally, bool]
"""Pieces that are done, the sum of their results, and whether the machine that did them is about to be taken away."""


class Threads:
    """Threads of this process."""

    def __init__(self, worker: Worker, *, threads: int, budget: int) -> None:
        """Start nothing yet.

        Args:
            worker: Does the pieces.
            threads: How many there are at most.
            budget: Bytes that all pieces under way may take together; one that takes more is done alone.
        """
        self._worker, self._threads, self._budget = worker, threads, _Budget(budget)

    def each(self, act: str, numbers: Sequence[int], found: Mapping[str, Tensor]) -> Iterator[Done]:
        """Do pieces, and say of each when it is done."""
        with ThreadPoolExecutor(self._threads) as pool:
            open_ = {pool.submit(self._one, act, n, found): n for n in numbers}
            try:
                for future in as_completed(open_):
                    tally = Tally()
                    number = open_.pop(future)
                    tally.add(number, future.result())
                    yield [number], tally, False
            finally:
                pool.shutdown(cancel_futures=True)

    @torch.no_grad()
    def _one(self, act: str, number: int, found: Mapping[str, Tensor]) -> Tensor | None:
        with self._budget.lent(self._worker.bytes(act, number)):
            return self._worker.do(act, number, found)


class _Budget:
    """Bytes that are lent in the order in which they are asked for."""

    def __init__(self, total: int) -> None:
        self._left, self._total = total, total
        self._turn, self._change = threading.Lock(), threading.Condition()

    @contextmanager
    def lent(self, amount: int) -> Iterator[None]:
        """Have so many, or all, while the block runs."""
        amount = min(amount, self._total)
        with self._turn, self._change:  # who waits for much is not overtaken by those who want little
            self._change.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._change:
                self._left += amount
                self._change.notify_all()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Have torch compute with the thread that calls it: how a sum is split among several would be seen in its bits.

    And have the process keep the memory that it frees from stretch to stretch.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    keep()
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Tasks:
    """Ray tasks, each of which does a bundle of pieces."""

    def __init__(
        self, open_worker: Callable[[Any], Worker], job: Any, resources: Resources, *, budget: int, home: Path
    ) -> None:
        """Start nothing yet.

        Args:
            open_worker: A function of a module, called with `job` in each process.
            job: Plain data and paths.
            resources: How many tasks there are at once, and what each asks for.
            budget: As of `Threads`, in each process.
            home: A folder that all of them have to see.
        """
        self._packed = pickle.dumps((open_worker, job))
        self._resources, self._budget, self._home = resources, budget, str(home)

    def each(self, act: str, bundles: Sequence[list[int]], found: Mapping[str, Tensor]) -> Iterator[Done]:
        """Do bundles of pieces, and say of each when it is done.

        Raises:
            NodeLost: A task was lost with its machine.
        """
        import ray

        asks = self._resources
        task = ray.remote(_bundle).options(name=act, **asked(asks))
        known, code, before = ray.put(dict(found)), brought(), nodes()
        waiting = iter(enumerate(bundles))
        under_way: dict[Any, int] = {}

        def start() -> None:
            for slot, numbers in waiting:
                place = task.remote(
                    self._packed, code, self._home, slot, self._threads, self._budget, act, numbers, known
                )
                under_way[place] = slot
                return

        try:
            for _ in range(asks.most):
                start()
            while under_way:
                (ready, *_), _ = ray.wait(list(under_way), num_returns=1)
                slot = under_way.pop(ready)
                done = _answer(ready, slot, before)
                start()
                yield done
        finally:
            for place in under_way:
                ray.cancel(place)

    @property
    def _threads(self) -> int:
        return threads_of(self._resources)


def asked(resources: Resources) -> dict[str, Any]:
    """What Ray is told of each task; what is tried again the schedule decides, not Ray."""
    return {
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": resources.gpus_per_worker or None,
        "memory": resources.memory or None,
        "label_selector": resources.labels,
        "max_retries": 0,
    }


def threads_of(resources: Resources) -> int:
    """How many threads each process has."""
    return max(1, int(resources.cpus_per_worker))


def _answer(place: Any, slot: int, before: frozenset[str]) -> Done:
    import ray

    try:
        answer: Done = ray.get(place)
    except ray.exceptions.RayTaskError as error:  # what a task raises comes as itself
        raise error.cause from error
    except ray.exceptions.RayError as error:
        lost = lost_with(f"task {slot}", error, before)
        if lost is not None:
            raise lost from error
        raise
    return answer


def _bundle(
    packed: bytes,
    code: Code,
    home: str,
    slot: int,
    threads: int,
    budget: int,
    act: str,
    numbers: list[int],
    found: Mapping[str, Tensor],
) -> Done:
    """One task."""
    if not Path(home).is_dir():
        raise FolderNotShared(slot, home)
    tally = Tally()
    with one_thread_each():
        for _, part, _ in Threads(_opened(packed, code), threads=threads, budget=budget).each(act, numbers, found):
            tally.take(part)
    return numbers, tally, Notices().leaving()


@functools.lru_cache(maxsize=1)
def _opened(packed: bytes, code: Code) -> Worker:
    """A process that does several bundles of the same work looks at its inputs once."""
    bring(code)
    open_worker, job = pickle.loads(packed)
    worker: Worker = open_worker(job)
    return worker
