"""What a run of many steps on many machines costs its driver and its readers. Nothing is computed.

`deciding` plays runs of three shapes, on machines that are only counted: something ends, and what can happen then is
decided, again and again. At some of these moments it is decided anew from the whole plan too, which is the baseline.

`driving` has the real driver, journal and store do it, on machines where every step is done at once and makes a few
bytes. What that asks of storage, and then `lfm show`, `ps` and `gc`, is compared with as many times a tenth of the run
as it takes: where the ratio is 1, it grows as the run does.
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rounds import Figure, command_line, compared, said

from cluster.capacity import Capacity, Node
from cluster.pool import Began, Ended, Handle, Pool
from cluster.processes import BEAT_S
from operators.resources import Resources
from pipelines.beginning import started
from pipelines.commands import gc, ps, show
from pipelines.execute import Task
from pipelines.leases import Leases
from pipelines.lineage import Journal, history, new_run, states
from pipelines.plan import Plan, PlannedStep
from pipelines.run import run
from pipelines.schedule import Outlook, Progress, Start, decide, infeasible
from pipelines.spec import Spec
from pipelines.storage.base import Storage
from pipelines.storage.opening import open_storage
from pipelines.store import Result, Store
from pipelines.view import LiveTable

Needs = Mapping[str, tuple[str, ...]]
GIB = 1 << 30
WIDTH = 100  # of a layer
ANEW = 20  # so many decisions of a run are made anew
ASKS = (
    Resources(),
    Resources(cpus_per_worker=4, memory=16 * GIB),
    Resources(gpus_per_worker=1, accelerator="gpu"),
    Resources(workers=4, strategy="ddp", cpus_per_worker=2, gpus_per_worker=1, accelerator="H100"),
)
REMARKS = (
    "Seconds are of CPU: another process that is busy does not change them much.",
    f"Time asks storage for something too: each lease of a step that runs is renewed every {BEAT_S:g} s, by a write.",
)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where no disk is waited for
KEPT, DECIDED_ANEW = "kept up with", "decided anew"


def chain(steps: int) -> Needs:
    """Each step needs the one before."""
    return {f"s{i:05}": (f"s{i - 1:05}",) if i else () for i in range(steps)}


def fan_out(steps: int) -> Needs:
    """One step, then all but two that need it, then one that needs all of those."""
    middle = {f"s{i:05}": ("first",) for i in range(steps - 2)}
    return {"first": (), **middle, "last": tuple(middle)}


def layers(steps: int) -> Needs:
    """Layers of steps, of which each needs one to three of the layer before."""
    draw, found = random.Random(steps), {}
    for i in range(steps):
        before = range(i - i % WIDTH - WIDTH, i - i % WIDTH)
        chosen = draw.sample(before, draw.randint(1, 3)) if i >= WIDTH else []
        found[f"s{i:05}"] = tuple(f"s{n:05}" for n in sorted(chosen))
    return found


SHAPES: dict[str, Callable[[int], Needs]] = {"chain": chain, "fan-out": fan_out, "layers": layers}


def planned(needs: Needs, asks: Sequence[Resources] = ASKS) -> Plan:
    """A plan whose steps do nothing, and ask for this and that in turns."""
    steps = {
        name: PlannedStep(
            name=name,
            operator="nothing",
            inputs={"after": before},
            method=None,
            params={},
            resources=asks[number % len(asks)],
            kind="dataset",
            effect=False,
            starts_workers=False,
            trains=False,
            needs=before,
            fingerprint=f"{number:064x}",
            components={"operator": "nothing", "inputs": list(before)},
        )
        for number, (name, before) in enumerate(needs.items())
    }
    return Plan(spec=Spec(name="scale", inputs={}, steps={}), inputs={}, steps=steps)


def machines(count: int) -> Capacity:
    """So many, a fifth of them with GPUs."""
    plain = Node(cpus=16, memory=64 * GIB)
    gpus = Node(cpus=64, gpus=8, memory=512 * GIB, accelerators=frozenset({"H100"}))
    return Capacity.of(gpus if i % 5 == 0 else plain for i in range(count))


@dataclass(frozen=True, slots=True)
class Played:
    """How long the decisions of a run took, in seconds of CPU; `anew` some of them made anew, evenly spread."""

    kept: tuple[float, ...]
    anew: tuple[float, ...]

    def total(self, how: str) -> float:
        """Seconds for all of them."""
        return sum(self.kept) if how == KEPT else statistics.mean(self.anew) * len(self.kept)

    def median(self, how: str) -> float:
        """Microseconds for one of them."""
        return 1e6 * statistics.median(self.kept if how == KEPT else self.anew)


def played(plan: Plan, capacity: Capacity, anew: int = ANEW) -> Played:
    """A run to its end, with a decision after whatever ends."""
    draw, now = random.Random(0), 0.0
    kept, again = [], []
    began = time.process_time()
    outlook = Outlook(plan, Progress())
    ends: list[tuple[float, str]] = []
    while ends or not kept:
        if kept:
            now, step = heappop(ends)
            began = time.process_time()
            outlook.end(step)
            outlook.finish(step)
        starts = [d.step for d in outlook.decide(capacity) if isinstance(d, Start)]
        for step in starts:
            outlook.begin(step)
            heappush(ends, (now + draw.uniform(1, 10), step))
        kept.append(time.process_time() - began)
        if len(kept) * anew > len(again) * len(plan.steps):
            since = Progress(done=frozenset(outlook.done), running=frozenset(outlook.running))
            again.append(_seconds(partial(decide, plan, since, capacity)))
    assert len(outlook.done) == len(plan.steps)
    return Played(tuple(kept), tuple(again))


def exponent(seconds: Mapping[int, float]) -> float:
    """The slope of a line through the logarithms: 1 where twice as many steps take twice as long."""
    sizes, took = [math.log(n) for n in seconds], [math.log(s) for s in seconds.values()]
    return statistics.linear_regression(sizes, took).slope


def deciding(sizes: Sequence[int], counts: Sequence[int], rounds: int) -> Iterator[Figure]:
    """For each shape: a decision of the longest run on more and more machines, and how all of them grow with it."""
    hows = (KEPT, DECIDED_ANEW)
    for shape, needs in SHAPES.items():
        plans = {n: planned(needs(n)) for n in sizes}
        runs = {(sizes[-1], c): [played(plans[sizes[-1]], machines(c)) for _ in range(rounds)] for c in counts}
        runs |= {(n, counts[-1]): [played(plans[n], machines(counts[-1])) for _ in range(rounds)] for n in sizes[:-1]}
        for count in counts:
            values = {how: [r.median(how) for r in runs[sizes[-1], count]] for how in hows}
            label = f"{shape} of {sizes[-1]} steps on {count} machines, a decision, median"
            yield compared(values, *hows, unit="us", label=label)
        values = {how: [r.total(how) for r in runs[sizes[-1], counts[-1]]] for how in hows}
        label = f"{shape} of {sizes[-1]} steps on {counts[-1]} machines, all decisions"
        yield compared(values, *hows, unit="s", label=label)
        values = {
            how: [exponent({n: runs[n, counts[-1]][i].total(how) for n in sizes}) for i in range(rounds)]
            for how in hows
        }
        label = f"{shape} of {' to '.join(map(str, (sizes[0], sizes[-1])))} steps, all decisions grow to the power of"
        yield compared(values, *hows, unit="", label=label, aim="about 1")


def fitting(steps: int, count: int, rounds: int) -> Figure:
    """Whether each step of a plan fits the machines at all, against asking so of a hundredth of them one by one."""
    asked, there = {n: s.resources for n, s in planned(chain(steps)).steps.items()}, machines(count)
    one_by_one = dict(list(asked.items())[: max(1, steps // 100)])

    def each() -> None:
        for name, asks in one_by_one.items():
            infeasible({name: asks}, there)

    values: dict[str, list[float]] = {"at once": [], "one by one": []}
    for _ in range(rounds):
        values["at once"].append(_seconds(partial(infeasible, asked, there)))
        values["one by one"].append(_seconds(each) * steps / len(one_by_one))
    label = f"whether {steps} steps fit {count} machines at all"
    return compared(values, "at once", "one by one", unit="s", label=label)


def _seconds(act: Callable[[], Any]) -> float:
    """Of CPU: the machine may be busy with other things."""
    began = time.process_time()
    act()
    return time.process_time() - began


class Counted:
    """A storage, what it is asked for, how many keys and bytes its answers have, and how many bytes it is given."""

    VERBS = (
        *("read", "list", "entries", "folders", "put_if_absent", "replace_if_match"),
        *("adopt", "fetch", "discard", "delete", "append"),
    )

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.storage, name)
        return partial(self._ask, name, found) if name in self.VERBS else found

    def _ask(self, verb: str, act: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        answer = act(*arguments, **options)
        self.asked["calls"] += 1
        self.asked[verb] += 1
        if verb in ("list", "entries", "folders"):
            self.asked["listings"] += 1
            self.asked["keys listed"] += len(answer)
        elif verb == "read":
            self.asked["bytes read"] += len(answer or b"")
        elif verb in ("put_if_absent", "replace_if_match", "append"):
            self.asked["bytes written"] += len(arguments[1])
        return answer


class Idle(Pool):
    """Machines on which a step is done, and has made a few bytes, as soon as its driver hears that it began."""

    def __init__(self, store: Store, capacity: Capacity) -> None:
        super().__init__(capacity)
        self.store = store
        self.open: deque[tuple[int, Task, bool]] = deque()
        self.numbers = itertools.count()
        self.most = 0  # open at once

    def living(self) -> Capacity:
        """All of them."""
        return self.capacity()

    def leaving(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def groups(self) -> dict[str, int]:
        """None."""
        return {}

    def start(self, act: Callable[[Any], Any], task: Task, **asked: Any) -> Handle:
        """Note it."""
        handle = next(self.numbers)
        self.open.append((handle, task, False))
        self.most = max(self.most, len(self.open))
        return handle

    def heard(self, handles: Sequence[Handle], timeout: float) -> list[Began | Ended]:
        """Of one at a time that it began and then that it is done, in turns."""
        handle, task, began = self.open.popleft()
        if began:
            return [Ended(handle, self._made(task))]
        self.open.append((handle, task, True))
        return [Began(handle, "machine")]

    def _made(self, task: Task) -> dict[str, Any]:
        self.store.storage.append(task.log, b"It did nothing.\n")
        folder = self.store.storage.scratch()
        (folder / "name.txt").write_text(task.step)
        digest = self.store.put(folder, "dataset", {})
        inputs = {k: [{"kind": "dataset", "digest": a.digest, "uri": ""} for a in v] for k, v in task.inputs.items()}
        self.store.commit(
            Result(
                fingerprint=task.fingerprint,
                kind="dataset",
                digest=digest,
                run=task.run,
                step=task.step,
                inputs=inputs,
                components=task.components,
            )
        )
        return {"kind": "commit", "artifact": "dataset", "digest": digest, "about": {}, "seconds": 0.0}


def driven(plan: Plan, capacity: Capacity, folder: Path) -> dict[str, float]:
    """What a run asks of storage, and those who look at it then: seconds and counts, by what they are of."""
    storage = Counted(open_storage(str(folder)))
    store = Store(storage)
    found: dict[str, float] = {}

    def of(what: str, act: Callable[[], Any], *kinds: str) -> None:
        storage.asked.clear()
        found[f"{what}, s"] = _seconds(act)
        found.update({f"{what}, {kind}": storage.asked[kind] for kind in kinds})

    idle = Idle(store, capacity)

    def drive() -> None:
        journal = Journal.claim(storage, new_run(plan.spec.name))
        journal.write([started(plan, journal.run, retries=0, mlflow="none", until="", address="local")])
        assert run(plan, store, journal, connect=lambda: contextlib.nullcontext(idle)) == "done"

    # Steps take no time here, so that nobody has to say meanwhile that they are still computed.
    with mock.patch("os.fsync"), mock.patch("pipelines.run.Leases", partial(Leases, clock=lambda: 0.0)):
        of("the driver, its steps' bytes included", drive, "calls", "keys listed")
    found["steps that run at once, so many leases are renewed at a time, leases"] = idle.most
    (name,) = storage.folders("runs")
    journal = [e for what in ("journal", "packs") for e in storage.entries(f"runs/{name}/{what}")]
    found["the journal, objects"] = len(journal)
    found["the journal, bytes"] = sum(e.size for e in journal)
    found["the store, objects"] = len([k for k in storage.list("") if not k.startswith(("scratch/", "locks/"))])
    of("steps' states read from the journal", lambda: states(history(storage, name), plan.steps), "calls")
    table = LiveTable(plan, storage, Console(file=io.StringIO(), force_terminal=True, width=120, height=50))
    with table:
        table(history(storage, name))
        of("the live table drawn", partial(_drawn, table))
    asked = {"store": storage.uri, "run": name, "json": False, "html": "", "runs": [], "keep_last": None}
    for command, opens, kinds in (
        (show, "storage_in", ("calls", "keys listed")),
        (ps, "storage_in", ("calls", "keys listed")),
        (gc, "open_storage", ("calls", "keys listed")),
    ):
        with mock.patch.object(command, opens, return_value=storage), contextlib.redirect_stdout(io.StringIO()):
            typed = Namespace(**asked, dry_run=True)
            of(f"lfm {command.__name__.rpartition('.')[2]}", partial(command.act, typed), *kinds)
    return found


def _drawn(table: LiveTable) -> None:
    table.due = 0.0
    table([])
    table.live.refresh()


def driving(steps: int, count: int, rounds: int) -> Iterator[Figure]:
    """Of one run, beside as many times a tenth of it."""
    whole, tenth = f"of {steps} steps", f"ten times that of {steps // 10}"
    with tempfile.TemporaryDirectory(prefix="scale-", dir=MEMORY) as folder:
        driven(planned(fan_out(3)), machines(1), Path(folder))  # imports what the others are not to pay for
    values: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, n, times in ((whole, steps, 1), (tenth, steps // 10, 10)):
            with tempfile.TemporaryDirectory(prefix="scale-", dir=MEMORY) as folder:
                for what, value in driven(planned(fan_out(n)), machines(count), Path(folder)).items():
                    values.setdefault(what, {whole: [], tenth: []})[name].append(times * value)
    for what, found in values.items():
        label, _, unit = what.rpartition(", ")
        yield compared(found, whole, tenth, unit=unit, label=f"{label}, a run {whole} on {count} machines")


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000, 10_000], metavar="N", help="of a plan")
    parser.add_argument("--machines", type=int, nargs="+", default=[10, 100, 1000], metavar="N", help="of a cluster")
    asked = parser.parse_args()
    said(list(figures(asked)), asked, remarks=REMARKS)


def figures(asked: argparse.Namespace) -> Iterator[Figure]:
    """All of them; steps and machines grow."""
    yield fitting(asked.steps[-1], asked.machines[-1], asked.rounds)
    yield from deciding(asked.steps, asked.machines, asked.rounds)
    yield from driving(asked.steps[-1], asked.machines[-1], asked.rounds)


if __name__ == "__main__":
    main()
