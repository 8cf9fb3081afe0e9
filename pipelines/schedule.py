"""Plan x Progress x Capacity -> decisions. Pure: no Ray, no clock, no files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.capacity import Capacity, Node
from operators.base import Resources
from pipelines.failures import BUDGETS, Failure
from pipelines.plan import Plan, PlannedStep
from pipelines.problems import Problem

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
    """Nothing that the cluster has now could hold this step.

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
    budgets: Mapping[Failure, int] = BUDGETS,
) -> tuple[Decision, ...]:
    """Everything that can happen now, in plan order. No `Start`, `Reuse` or `Finish` among it means wait.

    A step that has failed more often than a class's budget allows is given up; steps that need it never start. Without
    a `capacity` (no cluster was needed yet) whatever is ready starts.
    """
    hopeless = given_up(plan, progress, capacity, budgets)
    closed = progress.done | progress.running | hopeless
    open_steps = [s for s in plan.steps.values() if s.name not in closed]
    done = set(progress.done)  # and what this call reuses: a chain of stored results is one decision
    decisions: list[Decision] = []
    free = capacity
    if free is not None:
        for name in progress.running:
            free = _less(free, eased(plan.steps[name], _eased(name, progress)))
    for step in open_steps:
        if not done.issuperset(step.needs) or step.name in progress.elsewhere:
            continue
        if reusable(step, progress):
            decisions.append(Reuse(step.name))
            done.add(step.name)
            continue
        start = Start(step.name, _eased(step.name, progress), pause(progress.failures.get(step.name, {})))
        needs = eased(step, start.eased)
        missing = [] if capacity is None else infeasible({step.name: needs.resources}, capacity)
        if missing:
            waited, why = progress.waited.get(step.name, 0.0), missing[0].sentence
            decisions.append(
                Wait(step.name, why) if waited < needs.resources.schedule_timeout else Refuse(step.name, why)
            )
            continue
        left = None if free is None else _less(free, needs)
        if left is None or (left.cpus >= 0 and left.gpus >= 0 and left.memory >= 0):
            decisions.append(start)
            free = left
    if not decisions and not progress.running and not progress.elsewhere:
        failed = tuple(s for s in plan.steps if s in hopeless)
        return (Finish(failed=failed, skipped=tuple(s.name for s in open_steps)),)
    return tuple(decisions)


def given_up(
    plan: Plan, progress: Progress, capacity: Capacity | None, budgets: Mapping[Failure, int]
) -> frozenset[str]:
    """The steps that have failed too often to be tried again."""
    return frozenset(s for s in progress.failures if not _again(plan.steps[s], progress, capacity, budgets))


def eased(step: PlannedStep, times: int) -> PlannedStep:
    """The step as it is tried again after it ran out of memory so many times; its result stays the same."""
    asks = step.resources
    match relief(step):
        case "memory":
            return replace(step, resources=replace(asks, memory=asks.memory * 2**times))
        case "micro_batch" if times:
            size = max(1, _micro_batch(step) // 2**times)
            return replace(step, params={**step.params, "micro_batch_size": size})
    return step


def relief(step: PlannedStep) -> str:
    """What can be done where a step ran out of memory: ``micro_batch``, ``memory`` or ``nothing``."""
    asks = step.resources
    asked = asks.out_of_memory or ("micro_batch" if step.trains else "memory" if asks.memory else "nothing")
    return "nothing" if asked == "micro_batch" and _micro_batch(step) == 1 else asked


def pause(failed: Mapping[Failure, int]) -> float:
    """Seconds to wait before what failed so often is tried again: storage and nodes need some to come back."""
    times = failed.get(Failure.STORAGE, 0) + failed.get(Failure.NODE, 0)
    return min(PAUSE_S * 4 ** (times - 1), LONGEST_PAUSE_S) if times else 0.0


def _again(step: PlannedStep, progress: Progress, capacity: Capacity | None, budgets: Mapping[Failure, int]) -> bool:
    """Whether a step that has failed is tried again."""
    failed = progress.failures[step.name]
    if any(times > budgets[failure] for failure, times in failed.items()):
        return False
    if not failed.get(Failure.MEMORY):
        return True
    needs = eased(step, failed[Failure.MEMORY]).resources
    return relief(step) != "nothing" and (capacity is None or not infeasible({step.name: needs}, capacity))


def _eased(name: str, progress: Progress) -> int:
    return progress.failures.get(name, {}).get(Failure.MEMORY, 0)


def _micro_batch(step: PlannedStep) -> int:
    """The most rows that one worker holds at once."""
    size, rows = step.params.get("micro_batch_size"), step.params["batch_size"]
    assert isinstance(rows, int)
    return size if isinstance(size, int) else -(-rows // step.resources.workers)


def reusable(step: PlannedStep, progress: Progress) -> bool:
    """Whether the store's result stands for the step."""
    return step.fingerprint in progress.stored and step.name not in progress.forced and not step.effect


def infeasible(asked: Mapping[str, Resources], capacity: Capacity) -> list[Problem]:
    """A problem for everything that a step asks for and that `capacity` can never give."""
    problems = []
    for step, asks in asked.items():
        memory = asks.workers * asks.memory
        found = []
        for asked_for, what, enough, there in (
            ("cpus_per_worker", _counted(asks.cpus, "CPU"), asks.cpus <= capacity.cpus, f"{capacity.cpus:g}"),
            ("gpus_per_worker", _counted(asks.gpus, "GPU"), asks.gpus <= capacity.gpus, f"{capacity.gpus:g}"),
            ("memory", f"{_sized(memory)} of memory", memory <= capacity.memory, _sized(capacity.memory)),
        ):
            if not enough:
                fix = "Lower it, or run it on a larger cluster."
                sentence = f"asks for {what}, expected at most {there}, which is all there is. {fix}"
                found.append(Problem(("steps", step, "resources", asked_for), sentence))
        named = asks.accelerator not in ("cpu", "gpu") and asks.gpus <= capacity.gpus
        if named and capacity.accelerators is not None and asks.accelerator not in capacity.accelerators:
            there = ", ".join(sorted(capacity.accelerators)) or "none that is known"
            sentence = f"asks for the accelerator {asks.accelerator!r}, expected 'gpu' or what there is: {there}."
            found.append(Problem(("steps", step, "resources", "accelerator"), sentence))
        if not found and capacity.nodes:
            held = sum(node.holds(**asks.each) for node in capacity.nodes)
            if held < asks.workers:
                found.append(Problem(("steps", step, "resources"), _scattered(asks, held, capacity.nodes)))
        problems += found
    return problems


def _scattered(asks: Resources, held: int, nodes: tuple[Node, ...]) -> str:
    """Why workers of which each has to be on one machine do not fit, although there is enough in all."""
    wants = [_counted(asks.cpus_per_worker, "CPU")]
    wants += [_counted(asks.gpus_per_worker, "GPU")] if asks.gpus else []
    wants += [f"{_sized(asks.memory)} of memory"] if asks.memory else []
    nearest = max(nodes, key=lambda n: (n.holds(**asks.each), min(n.gpus, asks.gpus_per_worker), n.cpus, n.memory))
    has = [_counted(nearest.cpus, "CPU")]
    has += [_counted(nearest.gpus, "GPU")] if asks.gpus else []
    has += [f"{_sized(nearest.memory)} of memory"] if asks.memory else []
    return (
        f"asks for {asks.workers} x {' and '.join(wants)}, each on one machine, expected at most {room} of them; the "
        f"machine that comes nearest has {' and '.join(has)}. Lower it, or run it on larger machines."
    )


def _counted(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _sized(size: float) -> str:
    return f"{size:.0f} bytes" if size < 1e6 else f"{size / 1e9:,.2f} GB"


def _less(free: Capacity, step: PlannedStep) -> Capacity:
    asks = step.resources
    return Capacity(
        cpus=free.cpus - asks.cpus,
        gpus=free.gpus - asks.gpus,
        memory=free.memory - asks.workers * asks.memory,
    )
