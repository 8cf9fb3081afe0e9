"""Attempts that take too long and do not end themselves are ended, each once."""

from types import SimpleNamespace

import pytest

from cluster.pool import Began, Ended
from operators.resources import Resources
from pipelines import attempts
from pipelines.attempts import GRACE_S, Attempts
from tests.pipelines.failing import Clock


class Said:
    """A cluster that says what it is told to."""

    def __init__(self):
        self.says, self.ended, self.started = [], [], 0

    def start(self, act, task, **asked):
        self.started += 1
        return self.started

    def leaving(self):
        return frozenset()

    def heard(self, handles, timeout):
        says, self.says = self.says, []
        return says

    def end(self, handle):
        self.ended.append(handle)


@pytest.mark.parametrize(("limits", "ended"), [((0.0, 0.0), []), ((0.0, 5.0), [2]), ((9.0, 5.0), [2, 1])])
def test_what_is_late_is_ended_in_time_and_said_to_have_taken_too_long(monkeypatch, limits, ended):
    clock, pool = Clock(), Said()
    monkeypatch.setattr(attempts, "time", clock)
    under_way = Attempts(pool)
    for limit in (*limits, 1.0):
        task = SimpleNamespace(step="s", resources=Resources(timeout=limit), log="")
        under_way.start(task, alone=True, labels={})
    pool.says = [Began(handle, "node") for handle in (1, 2, 3)]
    assert under_way.ended(0.0) == []
    pool.says = [Ended(3, {"kind": "commit"})]
    assert len(under_way.ended(0.0)) == 1, "what has ended is not ended again"
    for _ in range(40):
        clock.sleep(1.0)
        under_way.ended(0.0)
        assert all(clock.now > 1_800_000_000.0 + limits[handle - 1] + GRACE_S for handle in pool.ended)
    assert pool.ended == ended
    pool.says = [Ended(2, error=RuntimeError("it is gone"))]
    ((_, said),) = under_way.ended(0.0)
    assert said["class"] == ("timeout" if limits[1] else "other")
