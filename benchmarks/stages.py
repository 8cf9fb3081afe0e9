"""Where the time of a training step goes before its first batch, looked at from inside its worker."""

import builtins
import contextlib
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from pipelines.execute import Task, execute

# Where the time goes, by the functions that take it; what is in none of them is "the rest".
STAGES = {
    "pipelines.execute._fetched": "fetch",
    "operators.tuning.load_tokenizer": "tokenizer",
    "operators.tuning.load": "model",
    "operators.tuning.check": "check",
    "operators.tuning.inject": "adapter",
    "operators.tuning.packed_rows": "packing",
    "operators.learning.loop._learner": "optimizer",
}


class Stages:
    """Seconds by stage, each without those inside it."""

    def __init__(self, began: float) -> None:
        self.seconds = {"driver and Ray": time.time() - began}
        self.open = ["the rest"]
        self.since = time.time()
        self.worker, self.first_batch = os.getpid(), 0.0

    def _charge(self) -> None:
        now = time.time()
        self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What the block takes is `name`'s; what is imported in it is not."""
        if self.first_batch or self.open[-1] == "imports":
            yield
            return
        self._charge()
        self.open.append(name)
        try:
            yield
        finally:
            if not self.first_batch:
                self._charge()
            self.open.pop()

    def timed(self, act: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`act` as a stage."""

        @functools.wraps(act)
        def within(*given: Any, **named: Any) -> Any:
            with self.stage(name):
                return act(*given, **named)

        return within

    def until(self, act: Callable[..., Any]) -> Callable[..., Any]:
        """`act`, whose first return ends it all."""

        @functools.wraps(act)
        def last(*given: Any, **named: Any) -> Any:
            made = act(*given, **named)
            if not self.first_batch:
                self._charge()
                self.first_batch = time.time()
            return made

        return last


def staged(task: Task, began: float) -> dict[str, Any]:
    """`execute`, and in what it says the seconds of each stage."""
    stages = Stages(began)
    with contextlib.ExitStack() as stack:
        for module, name in ((builtins, "__import__"), (importlib, "import_module")):
            stack.enter_context(mock.patch.object(module, name, stages.timed(getattr(module, name), "imports")))
        with stages.stage("imports"):
            importlib.import_module("operators.tuning")
        loop = sys.modules["operators.learning.loop"]
        stack.enter_context(mock.patch.object(loop, "on_device", stages.until(loop.on_device)))
        for path, name in STAGES.items():
            home, _, function = path.rpartition(".")
            act = getattr(sys.modules[home], function)
            stack.enter_context(mock.patch(path, stages.timed(act, name)))
        outcome = execute(task)
    before = {"stages": stages.seconds, "worker": stages.worker, "before": stages.first_batch - began}
    return {**outcome, **before}
