"""Plan x Progress x Capacity -> decisions. Pure: no Ray, no clock, no files."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.capacity import Capacity
from operators.base import Resources
from pipelines.plan import Plan, PlannedStep
from pipelines.problems import Problem


@dataclass(frozen=True, slots=True)
class Start:
    """Run this step."""

    step: str


@dataclass(frozen=True, slots=True)
class Reuse:
    """Take this step's result from the store."""

    step: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing more can happen.

    Attributes:
        failed: Steps that were given up.
        skipped: Steps that never started, because they need one that was given up.
    """

    failed: tuple[str, ...]
    skipped: tuple[str, ...]


Decision = Start | Reuse | Finish


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What has happened so far.

    Attributes:
        stored: Fingerprints whose results are in the store and were found whole.
        forced: Steps that run although their result is stored.
    """

    done: frozenset[str] = frozenset()
    running: frozenset[str] = frozenset()
    failures: Mapping[str, int] = field(default_factory=dict)
    stored: frozenset[str] = frozenset()
    forced: frozenset[str] = frozenset()


def decide(plan: Plan, progress: Progress, capacity: Capacity | None, *, max_failures: int = 0) -> tuple[Decision, ...]:
    """Everything that can happen now, in plan order. An empty tuple means wait.

    A step that fails more than `max_failures` times is given up; steps that need it never start. Without a
    `capacity` (no cluster was needed yet) whatever is ready starts.
    """
    given_up = {s for s, n in progress.failures.items() if n > max_failures}
    open_steps = [s for s in plan.steps.values() if s.name not in progress.done | progress.running | given_up]
    done = set(progress.done)  # and what this call reuses: a chain of stored results is one decision
    decisions: list[Decision] = []
    free = capacity
    if free is not None:
        for name in progress.running:
            free = _less(free, plan.steps[name])
    for step in open_steps:
        if not done.issuperset(step.needs):
            continue
        if reusable(step, progress):
            decisions.append(Reuse(step.name))
            done.add(step.name)
        elif free is None:
            decisions.append(Start(step.name))
        else:
            left = _less(free, step)
            if left.cpus >= 0 and left.gpus >= 0 and left.memory >= 0:
                decisions.append(Start(step.name))
                free = left
    if not decisions and not progress.running:
        failed = tuple(s for s in plan.steps if s in given_up)
        return (Finish(failed=failed, skipped=tuple(s.name for s in open_steps)),)
    return tuple(decisions)


def reusable(step: PlannedStep, progress: Progress) -> bool:
    """Whether the store's result stands for the step."""
    return step.fingerprint in progress.stored and step.name not in progress.forced and not step.effect


def infeasible(asked: Mapping[str, Resources], capacity: Capacity) -> list[Problem]:
    """A problem for everything that a step asks for and that `capacity` can never give."""
    problems = []
    for step, asks in asked.items():
        memory = asks.workers * asks.memory
        for asked_for, what, enough, there in (
            ("cpus_per_worker", _counted(asks.cpus, "CPU"), asks.cpus <= capacity.cpus, f"{capacity.cpus:g}"),
            ("gpus_per_worker", _counted(asks.gpus, "GPU"), asks.gpus <= capacity.gpus, f"{capacity.gpus:g}"),
            ("memory", f"{_sized(memory)} of memory", memory <= capacity.memory, _sized(capacity.memory)),
        ):
            if not enough:
                fix = "Lower it, or run it on a larger cluster."
                sentence = f"asks for {what}, expected at most {there}, which is all there is. {fix}"
                problems.append(Problem(("steps", step, "resources", asked_for), sentence))
        named = asks.accelerator not in ("cpu", "gpu") and asks.gpus <= capacity.gpus
        if named and capacity.accelerators is not None and asks.accelerator not in capacity.accelerators:
            there = ", ".join(sorted(capacity.accelerators)) or "none that is known"
            sentence = f"asks for the accelerator {asks.accelerator!r}, expected 'gpu' or what there is: {there}."
            problems.append(Problem(("steps", step, "resources", "accelerator"), sentence))
    return problems


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
