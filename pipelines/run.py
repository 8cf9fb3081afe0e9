"""Decisions -> attempts -> Events: does what `schedule` decides, and writes down what happened."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

from cluster.capacity import Capacity
from cluster.pool import Pool
from cluster.processes import LEASE_S
from operators.artifact import KINDS, Artifact, Deployment
from operators.sharing.notices import recall
from pipelines import stops
from pipelines.attempts import Attempts, unplaced
from pipelines.execute import Task
from pipelines.failures import BUDGETS, Failure
from pipelines.faults import reached
from pipelines.groups import Groups
from pipelines.leases import Leases
from pipelines.ledger import Turns
from pipelines.limits import Budget, passed
from pipelines.lineage import Event, Journal
from pipelines.placing import placed, waiting
from pipelines.plan import Plan, PlanError, PlannedStep
from pipelines.schedule import Finish, Outlook, Progress, Refuse, Reuse, Start, Wait, eased, infeasible
from pipelines.spec import Reference
from pipelines.storage.base import StorageFailed
from pipelines.store import Store

POLL_S = 0.5  # how often whoever watches hears that nothing has happened
LOOK_S = 2.0  # how often the cluster is looked at, and what other runs compute; sooner where a step has ended
SPARED = 10  # times what a look took: of many machines it takes long, and many steps end on them

Watch = Callable[[Sequence[Event]], None]


def run(
    plan: Plan,
    store: Store,
    journal: Journal,
    *,
    connect: Callable[[], AbstractContextManager[Pool]],
    stays: bool = False,
    forced: Sequence[str] = (),
    retries: int = 0,
    budget: Budget | None = None,
    priority: int = 0,
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
        budget: What the run may spend; it ends before it has spent more.
        priority: Of several runs that want what a cluster has, the one with the highest comes first.
        watch: Hears of events, and of none twice a second.

    Returns:
        ``done``, ``failed`` or ``interrupted``.
    """
    budgets = {**BUDGETS, Failure.OTHER: retries}
    driver = _Driver(plan, store, journal, watch, frozenset(forced), budgets, budget or Budget(), priority)
    return driver.drive(connect, stays=stays)


class _Ends(Exception):
    """The run is to end before it is done; its sentence says why."""


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
        budget: Budget,
        priority: int,
    ) -> None:
        self.plan, self.store, self.journal, self.watch = plan, store, journal, watch
        self.forced = forced
        self.budget, self.spent = budget, budget.before
        self.nodes: dict[str, int] = {}  # machines by group, since `counted`
        self.counted = time.monotonic()
        self.made: dict[str, Artifact] = dict(plan.inputs)
        found = store.hits(s.fingerprint for s in plan.steps.values())
        self.hits = {s.name: found[s.fingerprint] for s in plan.steps.values() if s.fingerprint in found}
        self.progress = Outlook(plan, Progress(stored=frozenset(found), forced=forced), budgets=budgets)
        self.leases = Leases(store.storage, journal.run)
        self.groups = Groups(store.storage)
        self.priority = priority
        self.turns: Turns | None = None  # where others use the cluster too
        self.told: dict[str, tuple[str, ...]] = {}  # what was said of steps that wait for their turn
        self.due: list[tuple[float, Start]] = []  # what was decided and waits
        self.waits: dict[str, float] = {}  # since when a step waits for a cluster that could hold it
        self.pool: Pool | None = None
        self.attempts: Attempts | None = None
        self.capacity: Capacity | None = None
        self.living: Capacity | None = None
        self.look_at = self.look_again = 0.0  # when, and when at the earliest
        self.heard = time.monotonic()  # when others could last see that this run lives

    def drive(self, connect: Callable[[], AbstractContextManager[Pool]], *, stays: bool) -> str:
        status, why = "failed", ""
        happened: list[Event] = []
        with ExitStack() as stack:
            stack.callback(self.leases.give_all_back)
            stack.callback(self._leave)
            try:
                while True:
                    decisions = self.progress.decide(self.capacity, self.living)
                    finish = [d for d in decisions if isinstance(d, Finish)]
                    if finish:
                        self._record(happened)
                        status = "failed" if finish[0].failed or finish[0].skipped else "done"
                        if stays:
                            self._stay()
                        break
                    happened += [self._reuse(d.step) for d in decisions if isinstance(d, Reuse)]
                    happened += self._unplaced([d for d in decisions if isinstance(d, Wait | Refuse)])
                    starts, waits = self._claimed([d for d in decisions if isinstance(d, Start)])
                    happened += waits
                    if starts and self.attempts is None:
                        self._record(happened)
                        happened = []
                        self._open(stack.enter_context(connect()))
                        continue
                    # One segment for what ended and what follows: the disk is waited for while the next step runs.
                    starts, waits = self._in_turn(self._due(starts))
                    self._record([*happened, *waits, *map(self._start, starts)])
                    happened = self._finished()
                    self._look()
            except KeyboardInterrupt:
                status = "interrupted"
            except _Ends as ends:
                status, why = "interrupted", str(ends)
                self._record(happened)
                self._drain()
            except BaseException:
                self._record([Event("finished", data={"status": "failed"})])
                raise
            self._record([Event("finished", data={"status": status, **({"why": why} if why else {})})])
        return status

    def _open(self, pool: Pool) -> None:
        self.pool, self.attempts = pool, Attempts(pool)
        self.capacity, self.living = pool.capacity(), pool.living()
        shared = pool.shared()
        self.turns = Turns(self.store.storage, shared, self.journal.run, self.priority) if shared else None
        reached("driver: Ray is open")
        problems = infeasible({n: s.resources for n, s in self.plan.steps.items()}, self.capacity)
        if problems:
            raise PlanError(tuple(map(str, problems)))

    def _stay(self) -> None:
        """Wait for Ctrl-C where a step has brought up an endpoint."""
        made = [self.made[n] for n in self.plan.steps if n in self.made]
        endpoints = [dict(m.about) for m in made if isinstance(m, Deployment)]
        if endpoints:
            with contextlib.suppress(KeyboardInterrupt, _Ends):
                self._record([Event("serving", data={"endpoints": endpoints})])
                while True:
                    time.sleep(POLL_S)
                    self._look()

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

    def _unplaced(self, decisions: Sequence[Wait | Refuse]) -> list[Event]:
        """Note since when steps wait for a larger cluster, and give up those that have waited long enough."""
        now = time.monotonic()
        new = [d for d in decisions if isinstance(d, Wait) and d.step not in self.waits]
        self.waits = {d.step: self.waits.get(d.step, now) for d in decisions}
        self.progress.waited = {s: now - since for s, since in self.waits.items()}
        return [
            *(Event("wait", d.step, {"why": d.why}) for d in new),
            *(self._refused(d) for d in decisions if isinstance(d, Refuse) and not self._withdrawn(d)),
        ]

    def _withdrawn(self, decision: Refuse) -> bool:
        """Take back what was handed to the cluster, whose end is heard like any other; False where nothing was."""
        self.due = [(when, s) for when, s in self.due if s.step != decision.step]
        return self.attempts is not None and self.attempts.refuse(decision.step, decision.why)

    def _refused(self, decision: Refuse) -> Event:
        if decision.step in self.progress.running:  # it was about to be handed over
            self.progress.end(decision.step)
        self._failed(self.plan.steps[decision.step], Failure.CAPACITY)
        said = {**unplaced(decision.why), "log": "", "attempt": self.journal.attempts(decision.step) + 1}
        return Event("fail", decision.step, said)

    def _claimed(self, starts: Sequence[Start]) -> tuple[list[Start], list[Event]]:
        """Those of which this run is to compute the results, and what there is to say of those that others compute."""
        ours, events = [], []
        for start in starts:
            step = self.plan.steps[start.step]
            holder = self._holder(step)
            if self.progress.reusable(step):
                continue
            if not holder:
                ours.append(start)
                continue
            self.progress.leave(step.name)
            events.append(Event("wait", step.name, {"why": f"run {holder} computes it", "by": holder}))
        return ours, events

    def _holder(self, step: PlannedStep) -> str:
        """The run that computes a step's result now, where that is not for us to do; one that is there is noted."""
        if not self._shared(step) or self.leases.holds(step.fingerprint, step.name):
            return ""
        holder = self.leases.take(step.fingerprint, step.name)
        hit = self.store.hit(step.fingerprint)
        if hit is not None:
            self.leases.give_back(step.fingerprint, step.name)
            self.hits[step.name] = hit
            self.progress.find(step.fingerprint)
        return holder

    def _shared(self, step: PlannedStep) -> bool:
        """Whether a result that is in the store stands for the step."""
        return bool(step.fingerprint) and not step.effect and step.name not in self.forced

    def _look(self) -> None:
        """See what the cluster has and what others have computed, now and then, and say that this run lives."""
        self._beat()
        now = time.monotonic()
        if now < self.look_at:
            return
        self.look_at = now + LOOK_S
        with contextlib.suppress(StorageFailed):  # the next time it may answer
            if stops.asked(self.store.storage, self.journal.run):
                raise _Ends(stops.ASKED)
        self._count(now)
        if self.attempts is not None:
            self._record(self.groups.news(self.attempts.tasks))
        if self.pool is not None:
            self.capacity, self.living = self.pool.capacity(), self.pool.living()
        steps = [self.plan.steps[s] for s in self.progress.elsewhere]
        for step in [s for s in steps if not self._holder(s) or self.progress.reusable(s)]:
            self.progress.take_back(step.name)
        looked = time.monotonic()
        self.look_again = looked + SPARED * (looked - now)

    def _count(self, now: float) -> None:
        """Add up what was spent since the last time, and end the run before it passes a limit."""
        profile = self.budget.profile
        self.spent = self.spent.after(now - self.counted, self.nodes, profile)
        self.counted = now
        nodes = self.pool.groups() if self.pool is not None and profile is not None else {}
        if nodes != self.nodes:
            self.nodes = nodes
            self._record([Event("nodes", data={"nodes": nodes})])
        ahead_s = LOOK_S + (self.budget.drain_s if self.attempts else 0.0)
        why = passed(self.budget.limits, self.spent, ahead_s, nodes, profile)
        if why:
            raise _Ends(why)

    def _drain(self) -> None:
        """Have the steps that run keep what they have, as where their machines go, and hear of those that are done."""
        if not self.attempts:
            return
        until = time.monotonic() + self.budget.drain_s
        with recall():
            while self.attempts and time.monotonic() < until:
                ended = self._finished()
                self._in_turn([])  # others may have what has ended
                self._record([e for e in ended if e.data.get("class") != Failure.PREEMPTION.value])
                self._beat()

    def _beat(self) -> None:
        """Say that this run lives; a storage that refuses that ends it only when others may have taken it for dead."""
        now = time.monotonic()
        try:
            self.leases.beat()
            if self.journal.beat():
                self.heard = now
        except StorageFailed:
            if now - self.heard > LEASE_S:
                raise

    def _due(self, starts: Sequence[Start]) -> list[Start]:
        """What may start now, of these and of what waited."""
        now = time.monotonic()
        self.due += [(now + s.delay, s) for s in starts]
        for start in starts:
            self.progress.begin(start.step)
        ready = [s for when, s in self.due if when <= now]
        self.due = [(when, s) for when, s in self.due if when > now]
        # What a step takes, or all that could hold it, may have been lost while it waited: then it is decided again.
        early = {s.step for s in ready if not self.progress.done.issuperset(self.plan.steps[s.step].needs)}
        early |= {s.step for s in ready if self.progress.lack(self.progress.running[s.step])}
        for step in early:
            self.progress.end(step)
        return [s for s in ready if s.step not in early]

    def _in_turn(self, ready: Sequence[Start]) -> tuple[list[Start], list[Event]]:
        """Those of which the turn has come, and what is new of those that go on waiting for it."""
        if self.turns is None or self.pool is None or self.attempts is None or self.capacity is None:
            return list(ready), []
        ours = [s for s in ready if not self.plan.steps[s.step].repeats]
        asked = {s.step: placed(self.progress.running[s.step], self.capacity) for s in ours}
        without = self.attempts.without_place()
        taken = self.turns.take(asked, self.capacity, unplaced=without, grows=self.pool.grows)
        waiting = asked.keys() - taken
        self.due += [(time.monotonic(), s) for s in ready if s.step in waiting]
        behind = {s.step: self.turns.behind[s.step] for s in ready if s.step in waiting & self.turns.behind.keys()}
        new = {step: runs for step, runs in behind.items() if self.told.get(step) != runs}
        self.told = behind
        return [s for s in ready if s.step not in waiting], [_waits(step, runs) for step, runs in new.items()]

    def _leave(self) -> None:
        if self.turns is not None:
            self.turns.leave()

    def _start(self, start: Start) -> Event:
        assert self.attempts is not None
        assert self.capacity is not None
        step, asked = start.step, self.plan.steps[start.step]
        planned = eased(asked, start.eased)
        asks, alone = planned.resources, not planned.starts_workers
        put = placed(asks, self.capacity)
        task = self._task(replace(planned, resources=put))
        self.attempts.start(task, alone=alone, labels=(put if alone else waiting(self.capacity)).labels)
        changed: dict[str, object] = {"memory": asks.memory} if asks != asked.resources else {}
        changed |= {k: v for k, v in planned.params.items() if v != asked.params[k]}
        return Event(
            "start", step, {"attempt": task.attempt, "log": task.log, **({"eased": changed} if changed else {})}
        )

    def _finished(self) -> list[Event]:
        if not self.attempts:
            if self.due or self.waits or self.progress.elsewhere:
                time.sleep(POLL_S)
            return []
        ended = self.attempts.ended(POLL_S)
        return [e for task, outcome in ended for e in (*self.groups.news([task]), self._ended(task, outcome))]

    def _ended(self, task: Task, outcome: dict[str, Any]) -> Event:
        step = self.plan.steps[task.step]
        self.progress.end(task.step)
        if self.turns is not None:
            self.turns.release(task.step)
        self.look_at = min(self.look_at, self.look_again)  # a step that waits for this one's result can have it
        if outcome["kind"] == "fail":
            self.look_at = 0.0  # a node may be gone
            outcome = self._committed(step) or outcome
        if outcome["kind"] == "commit":
            self._done(task.step, outcome["artifact"], outcome["digest"], outcome["about"], outcome.get("uri", ""))
            self.leases.give_back(step.fingerprint, step.name)
        else:
            if "lost" in outcome and not self._lose(outcome["lost"]):  # nothing here makes it again
                outcome["class"] = Failure.USER.value
            self._failed(step, Failure(outcome["class"]))
        return Event(outcome.pop("kind"), task.step, {**outcome, "attempt": task.attempt})

    def _committed(self, step: PlannedStep) -> dict[str, Any]:
        """The outcome of a step whose result is in the store: it has committed, whatever its process came to then."""
        hit = self.store.hit(step.fingerprint) if self._shared(step) else None
        if hit is None:
            return {}
        done = {"kind": "commit", "artifact": hit.kind, "digest": hit.digest, "about": hit.about}
        return {**done, **({"uri": hit.uri} if hit.uri else {}), "seconds": hit.seconds}

    def _failed(self, step: PlannedStep, failure: Failure) -> None:
        self.progress.fail(step.name, failure)
        if step.name in self.progress.given_up:
            self.leases.give_back(step.fingerprint, step.name)

    def _lose(self, digest: str) -> bool:
        """Have what the store has lost made again, unless that is under way; False where no step makes it."""
        makers = {n for n in self.plan.steps if n in self.made and self.made[n].digest == digest}
        for step in makers:
            self.progress.lose(step)
            self.progress.forget(self.plan.steps[step].fingerprint)
        return bool(makers)

    def _done(self, step: str, kind: str, digest: str, about: Mapping[str, Any], uri: str) -> None:
        if uri:  # an input that the step hands on, which may lie elsewhere than when it did so first
            uri = next((a.uri for a in self.plan.inputs.values() if a.digest == digest), uri)
        self.made[step] = KINDS[kind](uri, digest, about)
        self.progress.finish(step)

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
            earlier=step.earlier,
        )

    def _filled(self, reference: Reference) -> Any:
        if isinstance(reference, str):
            return self.made[reference]
        if isinstance(reference, Mapping):
            return {k: self.made[n] for k, n in reference.items()}
        return [self.made[n] for n in reference]


def _waits(step: str, behind: Sequence[str]) -> Event:
    """A step waits until its run may have what it asks for."""
    runs = f"run{'s' if len(behind) > 1 else ''} {', '.join(behind)}" if behind else "other steps of this run"
    return Event("wait", step, {"why": f"its turn on the cluster comes after {runs}", "behind": list(behind)})
