"""Whatever happens to whatever pipeline: what is committed stays, and the run goes on to the one end that it can have.

A case is a graph of steps, what goes wrong with each attempt at them, and how its drivers end. It is driven by the real
driver, on a cluster in this process. What the journal then tells is held against `Model`, which knows the rules and
nothing of how they are kept.
"""

import errno
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from ray.exceptions import NodeDiedError, WorkerCrashedError

from cluster import processes
from operators.artifact import Dataset
from pipelines import execute as executing
from pipelines.execute import Task, execute
from pipelines.lineage import Event, Journal, by_driver, history, states
from pipelines.plan import PlannedStep
from pipelines.run import run
from pipelines.storage.base import StorageFailed
from pipelines.storage.local import LocalStorage
from pipelines.store import Store, canonical
from tests.pipelines.failing import READS, WRITES, Clock, FailingStorage, FakePool, fast
from tests.pipelines.graphs import CODE, Step, digests_of, planned

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where no database waits for a disk
FIRST, ELSE = 1_000_000, 1  # processes: what comes before the first driver, and the other run
BUDGETS = {"user": 0, "memory": 1, "preemption": 64, "node": 4, "storage": 2}
CLASSES = {
    "raise": "user",
    "other": "other",
    "memory": "memory",
    "dies": "other",
    "dies late": "other",
    "loses its node": "node",
    "loses its node late": "node",
    "is preempted": "preemption",
    "finds damage": "storage",
}
"""How an attempt may go wrong, and of which class that is; storage that refuses its n-th write is a number."""
DEATHS = {
    **dict.fromkeys(("dies", "dies late"), WorkerCrashedError()),
    **dict.fromkeys(("loses its node", "loses its node late", "is preempted"), NodeDiedError("its node has died")),
}
"""What Ray says of those whose process does not live to answer."""


@dataclass(frozen=True)
class End:
    """How a driver ends before its run does.

    Attributes:
        how: ``killed``, ``interrupted`` or ``refused``: its storage fails once.
        at: At which of its calls of storage.
        after: Whether that call is done.
        orphans: Whether what it had begun is done all the same, without it.
    """

    how: str
    at: int
    after: bool = False
    orphans: bool = False


@dataclass(frozen=True)
class Other:
    """Another run, which computes the result of one of the steps.

    Attributes:
        how: ``commits``, ``gives up``, ``dies``, or ``is silent``: it lies on a machine of which nothing is heard.
        at: After how many seconds.
    """

    step: str
    how: str
    at: int


@dataclass(frozen=True)
class Case:
    """A graph and what goes wrong.

    Attributes:
        faults: For each step, what goes wrong with its attempts, from the first on.
        stored: Steps whose results are there before the run.
        forced: Steps that its first driver is to make again.
        ends: How drivers end; the one after them is left alone.
        retries: How often a step may fail for no known reason.
        order: Decides which of the steps that run goes on first.
    """

    graph: Mapping[str, Step]
    faults: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    stored: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    ends: tuple[End, ...] = ()
    other: Other | None = None
    retries: int = 0
    order: int = 0


class Killed(BaseException):
    """The driver's process is gone."""


class Model:
    """What may be said of a run, given what was said before."""

    def __init__(self, case: Case, digests: Mapping[str, str]) -> None:
        self.case, self.digests = case, digests
        self.budgets = {**BUDGETS, "other": case.retries}
        self.begin()

    def begin(self) -> None:
        """Another driver knows nothing of what failed before it."""
        self.made: set[str] = set()
        self.running: set[str] = set()
        self.failed: dict[str, Counter[str]] = {n: Counter() for n in self.case.graph}

    def given_up(self, name: str) -> bool:
        failed = self.failed[name]
        helpless = failed["memory"] and not self.case.graph[name].memory
        return bool(helpless) or any(times > self.budgets[why] for why, times in failed.items())

    def hear(self, event: Any) -> None:
        """Take an event in, which has to be allowed now."""
        name, data = event.step, event.data
        if event.kind == "started":
            self.begin()
        elif event.kind == "start":
            assert not self.given_up(name), f"{name} is tried once more than it may be"
            assert name not in self.running | self.made, f"{name} is done or under way"
            assert self.made.issuperset(self.case.graph[name].needs), f"{name} starts before what it needs"
            self.running.add(name)
        elif event.kind in ("commit", "reuse"):
            assert data["digest"] == self.digests[name], f"{name} is another than without faults"
            assert (event.kind == "commit") == (name in self.running), f"{name} is done and was not started"
            self.running.discard(name)
            self.made.add(name)
        elif event.kind == "fail":
            self.running.remove(name)
            self.failed[name][data["class"]] += 1
            self.made -= {n for n, digest in self.digests.items() if digest == data.get("lost")}

    def ends(self) -> dict[str, str]:
        """How each step has to end, now that nothing more can happen."""
        found: dict[str, str] = {}
        for name, step in sorted(self.case.graph.items()):
            if self.given_up(name):
                found[name] = "failed"
            elif name in self.made:
                found[name] = "done"
            else:
                assert any(found[n] != "done" for n in step.needs), f"{name} could have been done"
                found[name] = "skipped"
        return found


class World:
    """A store, the processes that work on it, and what goes wrong."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.plan, self.clock = case, planned(case.graph), Clock()
        self.digests = digests_of(case.graph)
        self.store = Store(LocalStorage(folder))
        self.random = random.Random(case.order)
        self.now = FIRST  # the process that does something
        self.alive = {ELSE}
        self.forced: frozenset[str] = frozenset()
        self.tried: Counter[str] = Counter()
        self.reached: list[bool] = []  # whether each driver has ended as it was to
        self.came: list[dict[str, list[str]]] = []  # for each driver, what came of each step's attempts
        self.pool = FakePool(self.clock)
        self.clock.passed = self._other_acts
        self.other_acts_at = self.clock.now + case.other.at if case.other else 0.0

    def drive(self, run_name: str, only: Sequence[str] = (), end: End | None = None) -> str | None:
        """Have a driver of its own process go on with a run; what it says of it, or nothing where it could not."""
        self.now += 1
        self.alive.add(self.now)
        self.came.append({})
        self.pool = FakePool(self.clock, started=self._started, choose=self.random.choice, end=self._ended)
        storage: Any = self.store.storage if end is None else Ending(self.store.storage, end)
        try:
            journal = Journal.claim(storage, run_name)
            journal.write([Event("started")])
            return run(
                planned(self.case.graph, only),
                Store(storage),
                journal,
                connect=lambda: nullcontext(self.pool),
                forced=sorted(self.forced),
                retries=self.case.retries,
            )
        except (Killed, KeyboardInterrupt, StorageFailed):
            return None
        finally:
            self.alive.discard(self.now)
            self.forced = frozenset()
            self.reached += [] if end is None else [storage.reached]
            if end is not None and end.orphans:
                for handle in sorted(self.pool.began & self.pool.open.keys()):
                    act, task = self.pool.open[handle]
                    act(task)

    def _started(self, task: Task) -> None:
        forced = {self.plan.steps[n].fingerprint for n in self.forced}  # such a step asks nobody, its twin included
        if task.effect or task.fingerprint in forced:
            return
        assert self.store.hit(task.fingerprint) is None, f"{task.step} is committed and done again"
        same = [t.step for _, t in self.pool.open.values() if t.fingerprint == task.fingerprint]
        assert not same, f"{task.step} is done at the same time as {same}"

    def _ended(self, act: Callable[[Task], Any], task: Task, node: str) -> Any:
        """What comes of an attempt; nothing yet where its node is about to go."""
        faults, number = self.case.faults.get(task.step, ()), self.tried[task.step]
        fault = faults[number] if number < len(faults) else ""
        if fault == "is preempted" and node not in self.pool.gone:
            self.pool.gone.add(node)
            return None
        self.tried[task.step] += 1
        if fault in ("raise", "other", "memory"):
            task = replace(task, params={**task.params, "fail": fault})
        if fault == "finds damage" and not self._damage(task):
            fault = ""
        spoilt = not all(self.store.whole(one.digest, bytes_too=True) for one in task.inputs["after"])
        answer: Any = None
        if fault not in ("dies", "loses its node", "is preempted"):
            with refusing(fault if isinstance(fault, int) else 0):
                answer = act(task)
        death = DEATHS.get(fault)
        if death is not None:
            expected = CLASSES[str(fault)]
        elif isinstance(fault, int):  # some writes do not matter
            expected = "storage" if answer["kind"] == "fail" else "commit"
        else:
            expected = "storage" if spoilt else CLASSES.get(fault, "commit")
        assert death is not None or expected == answer.get("class", "commit"), f"{fault} came to {answer}"
        shared = not task.effect and task.step not in self.forced
        if shared and self.store.hit(task.fingerprint) is not None:  # whatever its process came to, it is done
            expected = "commit"
        self.came[-1].setdefault(task.step, []).append(expected)
        return answer if death is None else death

    def _damage(self, task: Task) -> bool:
        """Change a byte of something that the task takes, if it takes anything."""
        if not task.inputs["after"]:
            return False
        path = self.store.storage.root / "artifacts" / task.inputs["after"][0].digest / "text.txt"
        if path.exists():  # else it is in quarantine already
            path.chmod(0o644)
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        return True

    def begin_other(self) -> None:
        """Have another run hold the lease of what it computes."""
        other = self.case.other
        if other is not None and other.step in self.plan.steps and not self.plan.steps[other.step].effect:
            claim = {"host": "away" if other.how == "is silent" else "here", "pid": ELSE, "born": 1.0}
            self.store.storage.put_if_absent(
                self._lease(), canonical({**claim, "run": "other", "step": "s", "beat": 0})
            )

    def _lease(self) -> str:
        assert self.case.other is not None
        return f"leases/{self.plan.steps[self.case.other.step].fingerprint}.json"

    def _other_acts(self) -> None:
        other = self.case.other
        if not other or not self.other_acts_at or self.clock.now < self.other_acts_at:
            return
        if json.loads(self.store.storage.read(self._lease()) or b"{}").get("run") != "other":
            return
        step = self.plan.steps[other.step]
        if other.how == "commits" and not all(self.store.whole(self.digests[n], bytes_too=True) for n in step.needs):
            return  # it waits too, for what we make
        self.other_acts_at = 0.0
        if other.how == "commits":
            execute(self._task_of(step))
        if other.how == "dies":
            self.alive.discard(ELSE)
        elif other.how != "is silent":
            self.store.storage.delete(self._lease())

    def _task_of(self, step: PlannedStep) -> Task:
        return Task(
            store=self.store.storage.uri,
            run="other",
            step=step.name,
            attempt=1,
            operator=step.operator,
            method=None,
            params=step.params,
            inputs={"after": [Dataset("", self.digests[n], {}) for n in step.needs]},
            resources=step.resources,
            effect=False,
            fingerprint=step.fingerprint,
            components=step.components,
            code=CODE,
        )


class Ending:
    """A driver's storage, one call of which ends it."""

    def __init__(self, storage: Any, end: End) -> None:
        self._storage, self._end, self._calls = storage, end, 0

    @property
    def reached(self) -> bool:
        return self._calls >= self._end.at

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        return partial(self._call, found) if name in WRITES + READS else found

    def _call(self, act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self._calls += 1
        end = self._end
        if self._calls > end.at and end.how == "killed":
            raise Killed
        if self._calls != end.at:
            return act(*arguments, **options)
        if end.after:
            act(*arguments, **options)
        if end.how == "killed":
            raise Killed
        if end.how == "interrupted":
            raise KeyboardInterrupt
        raise StorageFailed("somewhere", os.strerror(errno.EIO))


@contextmanager
def refusing(number: int) -> Iterator[None]:
    """Have the n-th write of a step fail; of a negative one only the answer gets lost."""
    with pytest.MonkeyPatch.context() as patched:
        if number:
            fault = {"number": abs(number), "error": errno.EIO, "after": number < 0}
            patched.setattr(executing, "open_storage", lambda uri: FailingStorage(LocalStorage(Path(uri)), **fault))
        yield


def check(case: Case) -> bool:
    """Drive a case to its end, and see that everything that must hold does; whether each driver got to its end."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patched:
        world = World(case, Path(folder))
        patched.setattr(processes, "this", lambda: {"host": "here", "pid": world.now, "born": 1.0})
        patched.setattr(
            processes, "alive", lambda one: one["pid"] in world.alive if one.get("host") == "here" else None
        )
        with fast(world.clock):
            if case.stored:
                faults, world.case = case, replace(case, faults={})
                assert world.drive("before", only=case.stored) == "done"
                world.case = faults
            world.begin_other()
            world.forced = frozenset(case.forced)
            ends: tuple[End | None, ...] = (*case.ends, None)
            drivers = len(world.came)
            for end in ends:
                said = world.drive("run", end=end)
        storage = world.store.storage
        events = history(storage, "run")
        model = Model(case, world.digests)
        for event in events:
            model.hear(event)
        ended = model.ends()
        assert said == ("done" if set(ended.values()) == {"done"} else "failed")
        last = by_driver(events)[-1]
        found = states(last, case.graph)
        for name, how in ended.items():
            assert how == "skipped" or found[name].state in {"done": ("done", "reused"), "failed": ("failed",)}[how]
            assert how != "done" or world.store.whole(world.digests[name], bytes_too=True)
        told: dict[str, list[str]] = {}
        for event in last:
            if event.kind in ("commit", "fail"):
                told.setdefault(event.step, []).append(event.data.get("class", "commit"))
        assert told == world.came[-1]
        assert len(world.came) == drivers + len(ends)
        held = [json.loads(storage.read(k) or b"{}") for k in storage.list("leases")]
        assert world.now not in [one["pid"] for one in held], "the last driver has kept a lease"
        assert list(storage.scratches.iterdir()) == []
        return all(world.reached)


NAMES = "abcdefgh"
FAULTS = st.sampled_from(sorted(CLASSES)) | st.integers(-14, 14).filter(bool)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    names = NAMES[: draw(st.integers(2, len(NAMES)))]
    graph = {}
    for i, name in enumerate(names):
        needs = draw(st.lists(st.sampled_from(names[:i]), max_size=3, unique=True)) if i else []
        graph[name] = Step(
            needs=tuple(sorted(needs)),
            word=draw(st.sampled_from("xy")),
            effect=draw(st.sampled_from((False, False, False, True))),
            memory=draw(st.sampled_from((0, 1000))),
        )
    some = st.lists(st.sampled_from(names), max_size=2, unique=True).map(lambda found: tuple(sorted(found)))
    several = st.lists(FAULTS, max_size=4) | st.builds(lambda what, times: [what] * times, FAULTS, st.integers(1, 6))
    ends = st.builds(
        End,
        how=st.sampled_from(("killed", "interrupted", "refused")),
        at=st.integers(1, 120),
        after=st.booleans(),
        orphans=st.booleans(),
    )
    others = st.builds(
        Other,
        step=st.sampled_from(names),
        how=st.sampled_from(("commits", "gives up", "dies", "is silent")),
        at=st.integers(0, 20),
    )
    return Case(
        graph=graph,
        faults={n: tuple(draw(several)) for n in draw(some)},
        stored=tuple(names[: draw(st.integers(0, len(names)))]) if draw(st.booleans()) else (),
        forced=draw(some),
        ends=tuple(draw(st.lists(ends, max_size=2))),
        other=draw(st.none() | others),
        retries=draw(st.integers(0, 2)),
        order=draw(st.integers(0, 9)),
    )


KNOWN = {
    "it dies when it has committed": Case(graph={"a": Step()}, faults={"a": ("dies late",)}),
    "two find the same damage": Case(
        graph={"a": Step(), "b": Step(("a",)), "c": Step(("a",), "y")},
        faults={"b": ("finds damage",), "c": ("finds damage",)},
    ),
    "what it takes is lost while it waits": Case(
        graph={"a": Step(), "b": Step(("a",)), "c": Step(("a",), "y")},
        faults={"a": ("", 1), "b": (1,), "c": ("finds damage",)},
    ),
    "its twin is given up": Case(graph={"a": Step(), "b": Step()}, faults={"a": ("raise",)}),
    **{
        f"another run {how}": Case(graph={"a": Step(), "b": Step(("a",))}, other=Other("b", how, 3))
        for how in ("commits", "gives up", "dies", "is silent")
    },
}
"""What is worth a look of its own."""


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN)
def test_a_known_case_ends_as_it_has_to(case, order):
    check(replace(case, order=order))


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_a_run_goes_on_to_the_end_that_it_can_have(case):
    check(case)


@pytest.mark.soak
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_many_runs_do(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "interrupted", "refused"])
def test_a_driver_may_end_at_each_of_its_calls_of_storage(how):
    graph = {"a": Step(), "b": Step(("a",), effect=True)}
    at, reached = 0, True
    while reached:
        at += 1
        reached = check(Case(graph=graph, ends=(End(how, at, after=how == "killed"),)))
    assert at > 10
