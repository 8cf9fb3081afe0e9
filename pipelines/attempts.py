"""Task -> the cluster -> its outcome: the attempts that are under way."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count
from typing import Any

from cluster.pool import Began, Ended, Handle, Pool
from pipelines.execute import Task, execute
from pipelines.failures import Failure, classify
from pipelines.faults import reached

GRACE_S = 15.0  # how long a step that is late may take to end itself


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One task that was handed over.

    Attributes:
        alone: Whether it does its work in its own process, which then has the step's resources.
        began: When it got its place; None while it waits for one.
        node: Where that is.
        group: The node group of that; empty where it is of none.
        refused: Why it was ended from here: the machines that it waits for have not come. Empty where it was not.
    """

    task: Task
    alone: bool
    began: float | None = None
    node: str = ""
    group: str = ""
    refused: str = ""

    @property
    def until(self) -> float:
        """The time up to which it may work."""
        limit = self.task.resources.timeout
        return self.began + limit if limit and self.began is not None else math.inf


class Attempts:
    """What a run has handed to the cluster and has not heard the end of."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._open: dict[Handle, _Attempt] = {}
        self._ends: list[tuple[float, int, Handle]] = []  # when those whose time is limited are ended, the next first
        self._counted = count()
        self._left: frozenset[str] = frozenset()  # nodes that were said to be taken away

    def __bool__(self) -> bool:
        return bool(self._open)

    @property
    def tasks(self) -> list[Task]:
        """What they do."""
        return [attempt.task for attempt in self._open.values()]

    def start(self, task: Task, *, alone: bool, labels: Mapping[str, str]) -> None:
        """Hand a task over to a node with such labels."""
        asks = task.resources
        handle = self._pool.start(
            execute,
            task,
            name=task.step,
            cpus=asks.cpus_per_worker if alone else 0,
            gpus=asks.gpus_per_worker if alone else 0,
            memory=asks.memory if alone else 0,
            labels=labels,
        )
        reached("driver: a step was handed to Ray")
        self._open[handle] = _Attempt(task, alone)

    def refuse(self, step: str, why: str) -> bool:
        """End an attempt that has no place, which is heard of as of any that ends; False where there is none."""
        found = [(handle, attempt) for handle, attempt in self._open.items() if attempt.task.step == step]
        for handle, attempt in found:
            if not attempt.refused:
                self._open[handle] = replace(attempt, refused=why)
                self._pool.end(handle)
        return bool(found)

    def without_place(self) -> set[str]:
        """The steps that do their work in their own process, for which no machine has been found yet."""
        return {a.task.step for a in self._open.values() if a.alone and a.began is None}

    def ended(self, timeout: float) -> list[tuple[Task, dict[str, Any]]]:
        """Those that have ended, with their outcomes, as soon as there are some; none after `timeout` seconds."""
        self._left |= self._pool.leaving()
        said = self._pool.heard(tuple(self._open), timeout)
        for one in said:
            if isinstance(one, Began):
                known = self._open[one.handle]
                attempt = replace(known, began=time.monotonic(), node=one.node, group=one.group)
                self._open[one.handle] = attempt
                if attempt.until < math.inf:
                    heappush(self._ends, (attempt.until + GRACE_S, next(self._counted), one.handle))
        self._end_late_ones()
        return [self._outcome(one) for one in said if isinstance(one, Ended)]

    def _end_late_ones(self) -> None:
        while self._ends and self._ends[0][0] < time.monotonic():
            _, _, handle = heappop(self._ends)
            if handle in self._open:
                self._pool.end(handle)

    def _outcome(self, ended: Ended) -> tuple[Task, dict[str, Any]]:
        attempt = self._open.pop(ended.handle)
        reached("driver: a step has answered")
        # Whatever a step raises comes as an answer; with an error its process has died.
        answer: dict[str, Any] = ended.answer if ended.error is None else self._died(attempt, ended.error)
        if attempt.alone and attempt.group:  # on what the workers are that a step starts beside is not known here
            answer = {**answer, "group": attempt.group}
        if self._left.intersection(answer.get("nodes", ())):
            answer["class"] = Failure.PREEMPTION.value
        if attempt.refused and answer["kind"] == "fail":
            answer |= {**unplaced(attempt.refused), **({"log": ""} if attempt.began is None else {})}
        return attempt.task, answer

    def _died(self, attempt: _Attempt, error: BaseException) -> dict[str, Any]:
        failure, sentence = classify(error), str(error).strip().partition("\n")[0]
        if failure == Failure.OTHER and time.monotonic() >= attempt.until:
            failure = Failure.TIMEOUT
            sentence = f"took longer than {attempt.task.resources.timeout:g} s and was ended"
        elif failure == Failure.NODE and attempt.node in self._left:
            failure = Failure.PREEMPTION
        told = {"error": type(error).__name__, "class": failure.value, "sentence": sentence}
        return {"kind": "fail", **told, "log": attempt.task.log}


def unplaced(why: str) -> dict[str, str]:
    """What is told of a step whose machines have not come."""
    return {"error": "Unschedulable", "class": Failure.CAPACITY.value, "sentence": why}
