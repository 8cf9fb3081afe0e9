"""Decisions -> Ray -> Events: does what `schedule` decides, and writes down what happened."""

import contextlib
import functools
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

from cluster.capacity import Capacity
from operators.artifact import KINDS, Artifact, Deployment
from pipelines.execute import Task, execute
from pipelines.failures import BUDGETS, Failure, classify
from pipelines.faults import reached
from pipelines.lineage import Event, Journal
from pipelines.plan import Plan, PlanError, PlannedStep
from pipelines.schedule import Finish, Progress, Reuse, Start, decide, eased, infeasible
from pipelines.spec import Reference
from pipelines.store import Store

POLL_S = 0.5  # how often whoever watches hears that nothing has happened

Watch = Callable[[Sequence[Event]], None]


def run(
    plan: Plan,
    store: Store,
    journal: Journal,
    *,
    connect: Callable[[], AbstractContextManager[Capacity]],
    stays: bool = False,
    forced: Sequence[str] = (),
    retries: int = 0,
    watch: Watch = lambda events: None,
) -> str:
    """Drive a plan to its end.

    Args:
        plan: What to run.
        store: Where results are looked up and put.
        journal: Where every event goes before anybody else hears of it.
        connect: Opens Ray; only called when a step has to run.
        stays: Whether endpoints end with what `connect` opened, so that a run that has brought one up stays for it
            until it is interrupted.
        forced: Steps that run although their result is stored.
        retries: How often one step may fail, and be tried again, where neither its code nor its inputs are wrong and
            nothing else is known; other failures have budgets of their own (`failures.BUDGETS`).
        watch: Hears of events, and of none twice a second.

    Returns:
        ``done``, ``failed`` or ``interrupted``.
    """
    budgets = {**BUDGETS, Failure.OTHER: retries}
    return _Driver(plan, store, journal, watch, frozenset(forced), budgets).drive(connect, stays=stays)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One task that was handed to Ray, when, and whether it was ended because it took too long."""

    task: Task
    began: float
    late: bool = False


class _Driver:
    """One run's state: what has happened, what runs, and what each finished step made."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        journal: Journal,
        watch: Watch,
        forced: frozenset[str],
        budgets: Mapping[Failure, int],
    ) -> None:
        self.plan, self.store, self.journal, self.watch = plan, store, journal, watch
        self.budgets = budgets
        self.made: dict[str, Artifact] = dict(plan.inputs)
        found = store.hits(s.fingerprint for s in plan.steps.values())
        self.hits = {s.name: found[s.fingerprint] for s in plan.steps.values() if s.fingerprint in found}
        stored = frozenset(found)
        self.progress = Progress(stored=stored, forced=forced)
        self.tasks: dict[Any, _Attempt] = {}
        self.due: list[tuple[float, Start]] = []  # what was decided and waits
        self.capacity: Capacity | None = None

    def drive(self, connect: Callable[[], AbstractContextManager[Capacity]], *, stays: bool) -> str:
        status = "failed"
        happened: list[Event] = []
        with ExitStack() as stack:
            try:
                while True:
                    decisions = decide(self.plan, self.progress, self.capacity, budgets=self.budgets)
                    finish = [d for d in decisions if isinstance(d, Finish)]
                    if finish:
                        self._record(happened)
                        status = "failed" if finish[0].failed or finish[0].skipped else "done"
                        if stays:
                            self._stay()
                        break
                    happened += [self._reuse(d.step) for d in decisions if isinstance(d, Reuse)]
                    starts = [d for d in decisions if isinstance(d, Start)]
                    if starts and self.capacity is None:
                        self._record(happened)
                        happened = []
                        self.capacity = stack.enter_context(connect())
                        reached("driver: Ray is open")
                        stack.enter_context(_sigterm_interrupts())
                        problems = infeasible({n: s.resources for n, s in self.plan.steps.items()}, self.capacity)
                        if problems:
                            raise PlanError(tuple(map(str, problems)))
                        continue
                    # One segment for what ended and what follows: the disk is waited for while the next step runs.
                    self._record([*happened, *map(self._start, self._due(starts))])
                    happened = self._finished()
            except KeyboardInterrupt:
                status = "interrupted"
            except BaseException:
                self._record([Event("finished", data={"status": "failed"})])
                raise
            self._record([Event("finished", data={"status": status})])
        return status

    def _stay(self) -> None:
        """Wait for Ctrl-C where a step has brought up an endpoint."""
        made = [self.made[n] for n in self.plan.steps if n in self.made]
        endpoints = [dict(m.about) for m in made if isinstance(m, Deployment)]
        if endpoints:
            with contextlib.suppress(KeyboardInterrupt):
                self._record([Event("serving", data={"endpoints": endpoints})])
                while True:
                    signal.pause()

    def _record(self, events: Sequence[Event]) -> None:
        stamped = [replace(e, time=time.time()) for e in events]
        self.journal.write(stamped)
        self.watch(stamped)

    def _reuse(self, step: str) -> Event:
        hit = self.hits[step]
        self._done(step, hit.kind, hit.digest, hit.about, hit.uri)
        data = {
            "artifact": hit.kind,
            "digest": hit.digest,
            "about": hit.about,
            "run": hit.run,
            "seconds": hit.seconds,
        }
        return Event("reuse", step, data)

    def _due(self, starts: Sequence[Start]) -> list[Start]:
        """What may start now, of these and of what waited."""
        now = time.monotonic()
        self.due += [(now + s.delay, s) for s in starts]
        self.progress = replace(self.progress, running=self.progress.running | {s.step for s in starts})
        ready = [s for when, s in self.due if when <= now]
        self.due = [(when, s) for when, s in self.due if when > now]
        return ready

    def _start(self, start: Start) -> Event:
        step, asked = start.step, self.plan.steps[start.step]
        planned = eased(asked, start.eased)
        task = self._task(planned)
        asks = planned.resources
        alone = not planned.starts_workers
        reference = (
            _remote(fresh=asks.gpus > 0)
            .options(
                name=step,
                num_cpus=asks.cpus_per_worker if alone else 0,
                num_gpus=asks.gpus_per_worker if alone else 0,
                memory=asks.memory or None if alone else None,
                accelerator_type=asks.accelerator if alone and asks.accelerator not in ("cpu", "gpu") else None,
            )
            .remote(task)
        )
        reached("driver: a step was handed to Ray")
        self.tasks[reference] = _Attempt(task, time.monotonic())
        changed: dict[str, object] = {"memory": asks.memory} if asks != asked.resources else {}
        changed |= {k: v for k, v in planned.params.items() if v != asked.params[k]}
        return Event(
            "start", step, {"attempt": task.attempt, "log": task.log, **({"eased": changed} if changed else {})}
        )

    def _finished(self) -> list[Event]:
        if not self.tasks:
            if self.due:
                time.sleep(POLL_S)
            return []
        import ray

        ready, open_ones = ray.wait(list(self.tasks), num_returns=1, timeout=POLL_S)
        for reference in open_ones:
            attempt = self.tasks[reference]
            limit = attempt.task.resources.timeout
            if limit and not attempt.late and time.monotonic() - attempt.began > limit:
                self.tasks[reference] = replace(attempt, late=True)
                ray.cancel(reference, force=True)  # its process ends, and with it all that it started
        return [self._ended(reference) for reference in ready]

    def _ended(self, reference: Any) -> Event:
        import ray

        attempt = self.tasks.pop(reference)
        task = attempt.task
        try:
            outcome = ray.get(reference)
        except ray.exceptions.RayError as error:  # the process died; whatever a step raises comes as an outcome
            sentence, failure = str(error).strip().partition("\n")[0], classify(error)
            if attempt.late:
                sentence, failure = f"took longer than {task.resources.timeout:g} s and was ended", Failure.TIMEOUT
            failed = {"error": type(error).__name__, "class": failure.value, "sentence": sentence}
            outcome = {"kind": "fail", **failed, "log": task.log}
        reached("driver: a step has answered")
        running = self.progress.running - {task.step}
        self.progress = replace(self.progress, running=running)
        if outcome["kind"] == "commit":
            self._done(task.step, outcome["artifact"], outcome["digest"], outcome["about"], outcome.get("uri", ""))
        else:
            if "lost" in outcome and not self._lose(outcome["lost"]):  # nothing here makes it again
                outcome["class"] = Failure.USER.value
            counted = Counter(self.progress.failures.get(task.step, {})) + Counter([Failure(outcome["class"])])
            self.progress = replace(self.progress, failures={**self.progress.failures, task.step: counted})
        return Event(outcome.pop("kind"), task.step, {**outcome, "attempt": task.attempt})

    def _lose(self, digest: str) -> bool:
        """Have what the store has lost made again; False where no step makes it."""
        makers = {n for n in self.progress.done if n in self.made and self.made[n].digest == digest}
        fingerprints = {self.plan.steps[n].fingerprint for n in makers}
        self.progress = replace(
            self.progress, done=self.progress.done - makers, stored=self.progress.stored - fingerprints
        )
        return bool(makers)

    def _done(self, step: str, kind: str, digest: str, about: Mapping[str, Any], uri: str) -> None:
        self.made[step] = KINDS[kind](uri, digest, about)
        self.progress = replace(self.progress, done=self.progress.done | {step})

    def _task(self, step: PlannedStep) -> Task:
        return Task(
            store=self.store.storage.uri,
            run=self.journal.run,
            step=step.name,
            attempt=self.journal.attempts(step.name) + 1,
            operator=step.operator,
            method=step.method,
            params=step.params,
            inputs={k: self._filled(r) for k, r in step.inputs.items()},
            resources=step.resources,
            effect=step.effect,
            fingerprint=step.fingerprint,
            components=step.components,
            code=self.plan.spec.code,
        )

    def _filled(self, reference: Reference) -> Any:
        if isinstance(reference, str):
            return self.made[reference]
        if isinstance(reference, Mapping):
            return {k: self.made[n] for k, n in reference.items()}
        return [self.made[n] for n in reference]


@functools.cache
def _remote(*, fresh: bool) -> Any:
    """`execute` as a Ray task, tried once: `schedule` decides what is tried again.

    With `fresh` its process ends with it: one that lives on keeps its GPU memory.
    """
    import ray

    return ray.remote(max_retries=0, max_calls=1 if fresh else 0)(execute)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C; set after Ray, which brings a handler of its own."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
