"""Plan x Progress x Capacity -> decisions. Pure: no Ray, no clock, no files."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

from cluster.capacity import Capacity, Node
from operators.base import Resources
from pipelines.failures import BUDGETS, Failure
from pipelines.placing import placed
from pipelines.plan import Plan, PlannedStep
from pipelines.problems import Part, Problem

PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """Run this step.

    Attributes:
        eased: How often it ran out of memory: `eased` says what it does about that.
        delay: Seconds to wait before, for whatever failed to come back.
    """

    step: str
    eased: int = 0
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Reuse:
    """Take this step's result from the store."""

    step: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing that the cluster has now could hold this step, which may have started where more can come.

    Attributes:
        why: What it asks for and what there is.
    """

    step: str
    why: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Give this step up: it has waited for such a cluster for as long as it may; `why` as for `Wait`."""

    step: str
    why: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing more can happen.

    Attributes:
        failed: Steps that were given up.
        skipped: Steps that never started, because they need one that was given up.
    """

    failed: tuple[str, ...]
    skipped: tuple[str, ...]


Decision = Start | Reuse | Wait | Refuse | Finish


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What has happened so far.

    Attributes:
        failures: How often each step failed, by class.
        stored: Fingerprints whose results are in the store and were found whole.
        forced: Steps that run although their result is stored.
        elsewhere: Steps whose results another run, or another step, computes now.
        waited: For how many seconds each step has waited for a cluster that could hold it.
    """

    done: frozenset[str] = frozenset()
    running: frozenset[str] = frozenset()
    failures: Mapping[str, Mapping[Failure, int]] = field(default_factory=dict)
    stored: frozenset[str] = frozenset()
    forced: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    waited: Mapping[str, float] = field(default_factory=dict)


def decide(
    plan: Plan,
    progress: Progress,
    capacity: Capacity | None,
    *,
    living: Capacity | None = None,
    budgets: Mapping[Failure, int] = BUDGETS,
) -> tuple[Decision, ...]:
    """Everything that can happen now, in plan order: first of what runs. No `Start`, `Reuse` or `Finish` means wait.

    A step whose number of workers may change is held to the fewest: the others it takes, and lets go, by itself.
    A step that has failed more often than a class's budget allows is given up; steps that need it never start. Without
    a `capacity` (no cluster was needed yet) whatever is ready starts. That is what there can be; `living` is what
    there is: a step has its place only where that could hold it, and waits for it as long as for a larger cluster.
    """
    return Outlook(plan, progress, budgets=budgets).decide(capacity, living)


class Outlook:
    """What can happen next in a run, kept up with what happens: a decision looks at what is ready, not at the plan.

    Steps that are ready stand in lines, in plan order: one line for each thing that is asked for, of which none fits
    where the first does not, and one for those whose results are stored.

    Attributes:
        done, failures, stored, elsewhere: As of `Progress`; the methods alone change them.
        waited: As of `Progress`.
        running: What each step that runs asks for.
        given_up: The steps that have failed too often to be tried again.
    """

    def __init__(self, plan: Plan, progress: Progress, *, budgets: Mapping[Failure, int] = BUDGETS) -> None:
        self.plan, self.budgets = plan, budgets
        self.done, self.elsewhere = set(progress.done), set(progress.elsewhere)
        self.stored, self._forced = set(progress.stored), progress.forced
        self.waited = progress.waited
        self.failures = {n: Counter(failed) for n, failed in progress.failures.items()}
        self.running: dict[str, Resources] = {}
        self.given_up: set[str] = set()
        self._capacity: Capacity | None = None
        self._living: Capacity | None = None
        self._lacks: dict[Resources, str] = {}  # what the capacity has too little of, by what is asked for
        self._absent: dict[Resources, str] = {}  # what has not come of it, the same way
        self._held: Counter[Resources] = Counter()  # how many steps run, by what they ask for
        self._names = tuple(plan.steps)
        self._places = {name: place for place, name in enumerate(self._names)}
        self._unmet = {name: len(set(step.needs) - self.done) for name, step in plan.steps.items()}
        self._takers: dict[str, list[str]] = {}  # who needs a step
        self._makers: dict[str, list[str]] = {}  # by fingerprint
        for name, step in plan.steps.items():
            self._makers.setdefault(step.fingerprint, []).append(name)
            for need in dict.fromkeys(step.needs):
                self._takers.setdefault(need, []).append(name)
        self._lines: dict[Resources | None, list[int]] = {}  # of places, by what is asked for; None: of a stored result
        self._line_of: dict[str, Resources | None] = {}
        for name in progress.running:
            self.begin(name)
        self._judge(self.failures)
        self._line_up(self._names)

    def begin(self, step: str) -> None:
        """It runs, or is about to."""
        self.running[step] = self._asks(step)
        self._held[self.running[step]] += 1
        self._line_up([step])

    def end(self, step: str) -> None:
        """It runs no more, however it ended."""
        asks = self.running.pop(step)
        self._held[asks] -= 1
        if not self._held[asks]:
            del self._held[asks]
        self._line_up([step])

    def finish(self, step: str) -> None:
        """Its result is there."""
        if step not in self.done:
            self.done.add(step)
            self._met(step, -1)

    def lose(self, step: str) -> None:
        """Its result is gone."""
        if step in self.done:
            self.done.remove(step)
            self._met(step, 1)

    def fail(self, step: str, failure: Failure) -> None:
        """It has failed once more."""
        self.failures.setdefault(step, Counter())[failure] += 1
        self._judge([step])

    def find(self, fingerprint: str) -> None:
        """The store has a result."""
        self.stored.add(fingerprint)
        self._line_up(self._makers[fingerprint])

    def forget(self, fingerprint: str) -> None:
        """The store has it no more."""
        self.stored.discard(fingerprint)
        self._line_up(self._makers[fingerprint])

    def leave(self, step: str) -> None:
        """Another run, or another step, computes its result now."""
        self.elsewhere.add(step)
        self._line_up([step])

    def take_back(self, step: str) -> None:
        """Nobody else does any more."""
        self.elsewhere.discard(step)
        self._line_up([step])

    def reusable(self, step: PlannedStep) -> bool:
        """Whether the store's result stands for the step."""
        return step.fingerprint in self.stored and step.name not in self._forced and not step.effect

    def decide(self, capacity: Capacity | None, living: Capacity | None = None) -> tuple[Decision, ...]:
        """The same as the function of this name says of what has happened up to now."""
        if (capacity, living) != (self._capacity, self._living):
            self._capacity, self._living, self._lacks, self._absent = capacity, living, {}, {}
            self._judge(self.failures)
        decisions = (*self._without_place(), *self._possible())
        if decisions or self.running or self.elsewhere:
            return decisions
        left = [n for n in self._names if n not in self.done]
        failed = tuple(n for n in left if n in self.given_up)
        return (Finish(failed=failed, skipped=tuple(n for n in left if n not in self.given_up)),)

    def _without_place(self) -> Iterator[Wait | Refuse]:
        """The steps that were started and that the machines which are there could not hold: theirs have not come."""
        if self._capacity is None or self._living is None or all(self._has_come(asks) for asks in self._held):
            return
        for name in sorted(self.running, key=self._places.__getitem__):
            asks = self.running[name]
            if not self._has_come(asks):
                yield self._waiting(name, asks, self._absent[asks])

    def _has_come(self, asks: Resources) -> bool:
        assert self._capacity is not None
        assert self._living is not None
        if asks not in self._absent:
            self._absent[asks] = absent(asks, self._capacity, self._living)
        return not self._absent[asks]

    def _waiting(self, name: str, asks: Resources, why: str) -> Wait | Refuse:
        late = self.waited.get(name, 0.0) >= asks.schedule_timeout
        return Refuse(name, why) if late else Wait(name, why)

    def _possible(self) -> Iterator[Decision]:
        """What can happen, from the heads of all lines on; what only waits for what is reused here joins in."""
        room = self._room()
        lines = [iter(line) for line in self._lines.values()]
        heads = [(next(line), line) for line in lines]
        heapify(heads)
        unmet: dict[str, int] = {}
        full: set[Resources | None] = set()
        while heads:
            place, line = heappop(heads)
            name = self._names[place]
            asks = self._line_of[name] if name in self._line_of else self._line(name)
            if asks is None:
                yield Reuse(name)
                for taker in self._takers.get(name, ()):
                    unmet[taker] = unmet.get(taker, self._unmet[taker]) - 1
                    if not unmet[taker] and self._open(taker):
                        heappush(heads, (self._places[taker], iter(())))
            elif why := self.lack(asks):
                yield self._waiting(name, asks, why)
            else:
                left = None if room is None else _less(room, asks)
                if asks in full or not (left is None or (left.cpus >= 0 and left.gpus >= 0 and left.memory >= 0)):
                    full.add(asks)
                    continue  # nor does anybody behind it fit
                room = left
                yield Start(name, self._eased(name), pause(self.failures.get(name, {})))
            for following in line:
                heappush(heads, (following, line))
                break

    def _room(self) -> Capacity | None:
        """What nothing that runs holds."""
        room = self._capacity
        for asks, times in self._held.items():
            room = None if room is None else _less(room, asks, times)
        return room

    def _line_up(self, steps: Iterable[str]) -> None:
        """Have these stand in the lines where they belong now, and in no other."""
        for name in steps:
            place = self._places[name]
            if name in self._line_of:
                asks = self._line_of.pop(name)
                line = self._lines[asks]
                del line[bisect_left(line, place)]
                if not line:
                    del self._lines[asks]
            if not self._unmet[name] and self._open(name):
                asks = self._line_of[name] = self._line(name)
                insort(self._lines.setdefault(asks, []), place)

    def _line(self, name: str) -> Resources | None:
        return None if self.reusable(self.plan.steps[name]) else self._asks(name)

    def _open(self, name: str) -> bool:
        return not any(name in closed for closed in (self.done, self.running, self.given_up, self.elsewhere))

    def _met(self, step: str, change: int) -> None:
        takers = self._takers.get(step, [])
        for taker in takers:
            self._unmet[taker] += change
        self._line_up([step, *takers])

    def _judge(self, steps: Iterable[str]) -> None:
        """See which of those that have failed are tried again."""
        for name in steps:
            (self.given_up.discard if self._again(self.plan.steps[name]) else self.given_up.add)(name)
            self._line_up([name])

    def _again(self, step: PlannedStep) -> bool:
        failed = self.failures[step.name]
        if any(times > self.budgets[failure] for failure, times in failed.items()):
            return False
        return not failed.get(Failure.MEMORY) or (relief(step) != "nothing" and not self.lack(self._asks(step.name)))

    def _asks(self, name: str) -> Resources:
        return eased(self.plan.steps[name], self._eased(name)).resources

    def _eased(self, name: str) -> int:
        return self.failures[name][Failure.MEMORY] if name in self.failures else 0

    def lack(self, asks: Resources) -> str:
        """Why the capacity can never hold what is asked for; empty where it can."""
        if self._capacity is None:
            return ""
        if asks not in self._lacks:
            self._lacks[asks] = next((p.sentence for p in infeasible({"": asks}, self._capacity)), "")
        return self._lacks[asks]


def eased(step: PlannedStep, times: int) -> PlannedStep:
    """The step as it is tried again after it ran out of memory so many times; its result stays the same."""
    asks = step.resources
    match relief(step) if times else "nothing":
        case "memory":
            return replace(step, resources=replace(asks, memory=asks.memory * 2**times))
        case "micro_batch":
            size = max(1, _micro_batch(step, asks.most) // 2**times)  # fewer however many workers it had
            return replace(step, params={**step.params, "micro_batch_size": size})
    return step


def relief(step: PlannedStep) -> str:
    """What can be done where a step ran out of memory: ``micro_batch``, ``memory`` or ``nothing``."""
    asks = step.resources
    asked = asks.out_of_memory or ("micro_batch" if step.trains else "memory" if asks.memory else "nothing")
    return "nothing" if asked == "micro_batch" and _micro_batch(step, asks.least) == 1 else asked


def pause(failed: Mapping[Failure, int]) -> float:
    """Seconds to wait before what failed so often is tried again: storage and nodes need some to come back."""
    times = failed.get(Failure.STORAGE, 0) + failed.get(Failure.NODE, 0)
    return min(PAUSE_S * 4 ** (times - 1), LONGEST_PAUSE_S) if times else 0.0


def _micro_batch(step: PlannedStep, workers: int) -> int:
    """The most rows that one of so many workers holds at once."""
    size, rows = step.params.get("micro_batch_size"), step.params["batch_size"]
    assert isinstance(rows, int)
    return size if isinstance(size, int) else -(-rows // workers)


def infeasible(asked: Mapping[str, Resources], capacity: Capacity) -> list[Problem]:
    """A problem for everything that a step asks for and that `capacity` can never give."""
    machines = Counter(capacity.nodes)  # a thousand of them are of a few kinds, as what ten thousand steps ask for
    found: dict[Resources, list[tuple[Part, str]]] = {}
    for asks in asked.values():
        if asks not in found:
            found[asks] = _lacking(asks, capacity, machines)
    return [
        Problem(("steps", step, "resources", *field), sentence)
        for step, asks in asked.items()
        for field, sentence in found[asks]
    ]


def _lacking(asks: Resources, capacity: Capacity, machines: Mapping[Node, int]) -> list[tuple[Part, str]]:
    """The field, if it is one, and a sentence for each thing of which there is too little."""
    memory = asks.all_memory
    found: list[tuple[Part, str]] = []
    for asked_for, what, enough, there in (
        ("cpus_per_worker", _counted(asks.cpus, "CPU"), asks.cpus <= capacity.cpus, f"{capacity.cpus:g}"),
        ("gpus_per_worker", _counted(asks.gpus, "GPU"), asks.gpus <= capacity.gpus, f"{capacity.gpus:g}"),
        ("memory", f"{_sized(memory)} of memory", memory <= capacity.memory, _sized(capacity.memory)),
    ):
        if not enough:
            fix = "Lower it, or run it on a larger cluster."
            found.append(((asked_for,), f"asks for {what}, expected at most {there}, which is all there is. {fix}"))
    named = asks.accelerator not in ("cpu", "gpu") and asks.gpus <= capacity.gpus
    if named and capacity.accelerators is not None and asks.accelerator not in capacity.accelerators:
        there = ", ".join(sorted(capacity.accelerators)) or "none that is known"
        sentence = f"asks for the accelerator {asks.accelerator!r}, expected 'gpu' or what there is: {there}."
        found.append((("accelerator",), sentence))
    if not found and machines:
        held = sum(times * node.holds(**asks.each) for node, times in machines.items())
        if held < asks.least:
            found.append(((), _scattered(asks, held, tuple(machines))))
    return found


def absent(asks: Resources, most: Capacity, living: Capacity) -> str:
    """What a step asks for that no machines which are there could give it, were they empty; empty where they could.

    Workers that share a model begin together; of others one is enough to begin with.

    Args:
        asks: Of a step that has been started.
        most: What there can be.
        living: What there is.
    """
    asks = placed(asks, most)
    least = asks if asks.strategy != "single" else replace(asks, workers=1)
    if not infeasible({"": least}, living):
        return ""
    can = Counter(n.group for n in most.nodes if n.group and n.holds(**asks.each))
    has = Counter(n.group for n in living.nodes)
    said = [f"of group {group!r} there are {has[group]} of {can[group]}" for group in can if has[group] < can[group]]
    said.append(f"all that there is are {_counted(living.cpus, 'CPU')} and {_counted(living.gpus, 'GPU')}")
    return (
        f"asks for {asks.least} x {_each(asks)}, expected machines for that within {asks.schedule_timeout:g} s; "
        f"{', '.join(said)}. See why no more come, or raise schedule_timeout."
    )


def _scattered(asks: Resources, held: int, nodes: tuple[Node, ...]) -> str:
    """Why workers of which each has to be on one machine do not fit, although there is enough in all."""
    nearest = max(nodes, key=lambda n: (n.holds(**asks.each), min(n.gpus, asks.gpus_per_worker), n.cpus, n.memory))
    has = [_counted(nearest.cpus, "CPU")]
    has += [_counted(nearest.gpus, "GPU")] if asks.gpus else []
    has += [f"{_sized(nearest.memory)} of memory"] if asks.memory else []
    return (
        f"asks for {asks.least} x {_each(asks)}, each on one machine, expected at most {held} of them; the "
        f"machine that comes nearest has {' and '.join(has)}. Lower it, or run it on larger machines."
    )


def _each(asks: Resources) -> str:
    """What each worker asks for."""
    wants = [_counted(asks.cpus_per_worker, "CPU")]
    wants += [_counted(asks.gpus_per_worker, "GPU")] if asks.gpus else []
    wants += [f"{_sized(asks.memory)} of memory"] if asks.memory else []
    return " and ".join(wants)


def _counted(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _sized(size: float) -> str:
    return f"{size:.0f} bytes" if size < 1e6 else f"{size / 1e9:,.2f} GB"


def _less(room: Capacity, asks: Resources, times: int = 1) -> Capacity:
    return Capacity(
        cpus=room.cpus - times * asks.cpus,
        gpus=room.gpus - times * asks.gpus,
        memory=room.memory - times * asks.all_memory,
    )
