"""The steps that a step repeats -> runs of their own, one for each trial, below the run that searches.

A trial is the same pipeline with some values changed, planned again and run against the same store, so that what two
trials have in common is computed once. Its name says which one it is: who asks for it again hears what became of it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.capacity import Capacity
from cluster.connect import capacity
from cluster.pool import Began, Ended, Handle, Pool
from cluster.profile import Profile
from lfm.errors import LfmError
from operators.artifact import KINDS
from operators.catalog import Catalog
from operators.code import Code
from operators.workspace import Heard, Outcome
from pipelines.beginning import started
from pipelines.changes import written
from pipelines.execute import checkpoints_of, memory_of, modules
from pipelines.failures import Failure
from pipelines.inputs.inspector import Looks
from pipelines.limits import priced, spent
from pipelines.lineage import Event, Journal, RunIsLive, history, trial_name, trials
from pipelines.plan import Plan, PlanError, of_run, plan
from pipelines.problems import Places
from pipelines.profiles import profile_of
from pipelines.run import LOOK_S, POLL_S, Watch, run as drive
from pipelines.searches import differing, part, repeated, room, varied
from pipelines.spec import Spec, build, dump
from pipelines.storage.base import Storage
from pipelines.storage.opening import open_storage
from pipelines.store import Store
from pipelines.tracking import outbox
from pipelines.view import measured


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The `Trials` of one step of one run, as plain data.

    Attributes:
        pipeline: The steps that are repeated with all that they need, as `dump` gives them.
        names: The step that each input of the searching step names.
        retries: How often a step of a trial may fail.
        mlflow: Where trials are told.
        address: The cluster that the run was given, which a trial has when somebody goes on with it by itself.
        profile: Of that cluster, as the run's journal has it; empty where the run was given none.
        priority: Of the run, and so of its trials.
    """

    store: str
    run_name: str
    step: str
    pipeline: Mapping[str, Any]
    names: Mapping[str, str]
    code: Code
    retries: int
    mlflow: str
    address: str
    profile: Mapping[str, Any]
    priority: int = 0

    @classmethod
    def of(cls, storage: Storage, run: str, step: str) -> "Repeated":
        """Those of a step that runs, as its run's journal has them."""
        began = [e.data for e in history(storage, run) if e.kind == "started"][-1]
        code = Code(tuple(began["uses"]), tuple((k, v) for k, v in began["files"]))
        catalog = Catalog(modules(code))
        whole = build(dict(began["spec"]), Places(run), code=code, catalog=catalog).whole()
        verb = catalog.operator(whole.steps[step].operator)
        again = part(whole, repeated(step, whole, verb))
        return cls(
            store=storage.uri,
            run_name=run,
            step=step,
            pipeline=dump(again),
            names={k: str(whole.steps[step].inputs[k]) for k in verb.repeats},
            code=code,
            retries=began["retries"],
            mlflow=began["mlflow"],
            address=began["address"],
            profile=began.get("profile", {}),
            priority=began.get("priority", 0),
        )

    def written(self, fields: Iterable[str]) -> dict[str, Any]:
        """The values of some ``STEP.FIELD`` as the pipeline has them."""
        return written(self.pipeline, fields, self._catalog())

    def at_once(self, fields: Iterable[str]) -> int:
        """How many trials that differ in these fields the cluster has room for."""
        spec = self._spec()
        asked = [spec.steps[n].resources for n in differing(spec, fields)]
        return room(asked, self._most() or capacity())

    def run(self, changes: Mapping[str, Any], *, step: str = "", heard: Heard | None = None) -> Outcome:
        """Run the steps with some values changed, unless that was done before: then say what became of it.

        The arguments are those of `Trials.run`.
        """
        storage = open_storage(self.store)
        name = trial_name(self.run_name, self.step, changes)
        watch = (lambda events: None) if heard is None else Follower(storage, step, heard)
        while True:
            known = outcome(storage, name, self.names)
            if known is not None and known.state != "interrupted":
                return known
            try:
                journal = Journal.claim(storage, name)
            except RunIsLive:  # another trial with the same values
                time.sleep(POLL_S)
                continue
            self._drive(storage, journal, changes, watch)

    def outcomes(self) -> list[Outcome]:
        """What became of all that this step has begun so far, in that order, by earlier attempts too."""
        storage = open_storage(self.store)
        found = (outcome(storage, name, self.names) for name in trials(storage, self.run_name, self.step))
        own = (one for one in found if one is not None)
        return sorted(own, key=lambda one: (one.began, one.run))

    def spent(self) -> float | None:
        """What the machines have cost while the step ran that repeats these, whoever has used them."""
        profile = self._profile()
        if not priced(profile):
            return None
        events = history(open_storage(self.store), self.run_name)
        return spent(events, profile, time.time(), step=self.step).cost

    def forget(self, step: str) -> None:
        """Drop the checkpoints at which a step of trials rests."""
        storage = open_storage(self.store)
        for name in trials(storage, self.run_name, self.step):
            events = history(storage, name)
            if any(e.step == step for e in _rested(events)):
                storage.delete(checkpoints_of(events[0].data["steps"][step]["fingerprint"]))

    def _drive(self, storage: Storage, journal: Journal, changes: Mapping[str, Any], watch: Watch) -> None:
        store = Store(storage)
        noted: dict[str, Any] = {
            "until": "",
            "address": self.address,
            "priority": self.priority,
            "trial": {"of": self.run_name, "step": self.step, "names": self.names, "changes": dict(changes)},
        }
        if self.mlflow != outbox.NONE:
            outbox.enter(storage, journal.run, self.mlflow)
        try:
            made = of_run(self._plan(store, changes), journal.run)
        except LfmError as error:
            empty = Plan(spec=self._spec(), inputs={}, steps={})
            begun = started(empty, journal.run, retries=self.retries, mlflow=self.mlflow, **noted)
            journal.write([begun, _failed(error)])
            return
        journal.write([started(made, journal.run, retries=self.retries, mlflow=self.mlflow, **noted)])
        try:
            drive(
                made,
                store,
                journal,
                connect=partial(within, self._most(), shared=self.address != "local"),
                retries=self.retries,
                priority=self.priority,
                watch=watch,
            )
            if _rested(history(storage, journal.run)):
                journal.write([Event("finished", data={"status": "stopped"}, time=time.time())])
        except PlanError as error:
            journal.write([_failed(error)])
        except SystemExit:
            journal.write([Event("finished", data={"status": "stopped"}, time=time.time())])
            raise

    def _plan(self, store: Store, changes: Mapping[str, Any]) -> Plan:
        catalog = self._catalog()
        spec = varied(self._spec(), changes, catalog, "trial").whole()
        return plan(spec, Looks(memory_of(store.storage), store), catalog)

    def _most(self) -> Capacity | None:
        """What the cluster grows to; None where it is as it is."""
        profile = self._profile()
        return None if profile is None else profile.capacity()

    def _profile(self) -> Profile | None:
        return profile_of(self.profile)[0] if self.profile else None

    def _catalog(self) -> Catalog:
        return Catalog(modules(self.code))

    def _spec(self) -> Spec:
        return build(dict(self.pipeline), Places("trial"), code=self.code, catalog=self._catalog()).whole()


class Follower:
    """Hears a trial's events, and tells what one of its steps measures while it works."""

    def __init__(self, storage: Storage, step: str, heard: Heard) -> None:
        self.storage, self.step, self.heard = storage, step, heard
        self._log, self._told, self._due = "", 0, 0.0

    def __call__(self, events: Sequence[Event]) -> None:
        """Hear of events, and of none now and then."""
        for event in events:
            if event.step == self.step and event.kind in ("start", "commit", "fail"):
                self._tell()  # what it measured last
                self._log = str(event.data["log"]) if event.kind == "start" else ""
        if time.monotonic() > self._due:
            self._due = time.monotonic() + LOOK_S
            self._tell()

    def _tell(self) -> None:
        lines = [one for one in measured(self.storage, self._log) if "measures" in one] if self._log else []
        if lines and lines[-1]["done"] > self._told:
            self._told = int(lines[-1]["done"])
            self.heard(self._told, lines[-1]["measures"])


class _Own(Pool):
    """A cluster, and what was handed to it from here and has not ended."""

    def __init__(self, most: Capacity | None, *, shared: bool) -> None:
        super().__init__(most, shared=shared)
        self.open: set[Handle] = set()

    def start(self, act: Callable[[Any], Any], task: Any, **asked: Any) -> Handle:
        handle = super().start(act, task, **asked)
        self.open.add(handle)
        return handle

    def heard(self, handles: Sequence[Handle], timeout: float) -> list[Began | Ended]:
        said = super().heard(handles, timeout)
        self.open -= {one.handle for one in said if isinstance(one, Ended)}
        return said


@contextmanager
def within(most: Capacity | None = None, *, shared: bool = False) -> Iterator[Pool]:
    """The cluster that this process is part of, as `Pool` takes it; what was begun here ends here."""
    pool = _Own(most, shared=shared)
    try:
        yield pool
    finally:
        for handle in pool.open:
            pool.end(handle)


def _rested(events: Sequence[Event]) -> list[Event]:
    """What steps said that were to go no further."""
    return [e for e in events if e.kind == "fail" and e.data["class"] == Failure.RESTED]


def _failed(error: LfmError) -> Event:
    return Event("finished", data={"status": "failed", "why": str(error)}, time=time.time())


def outcome(storage: Storage, name: str, names: Mapping[str, str]) -> Outcome | None:
    """What a trial's journal says of it; None where it says nothing (yet).

    Args:
        storage: Where the run is.
        name: The run.
        names: The steps of which it is told what they made, by the name that this has.
    """
    events = history(storage, name)
    if not events:
        return None
    began: Mapping[str, Any] = events[0].data
    last = [e for e in events if e.kind in ("started", "finished")][-1]
    ends = {e.step: e for e in events if e.kind in ("commit", "reuse", "fail")}
    made = {e.step: e.data for e in ends.values() if e.kind != "fail"}
    state = "interrupted" if last.kind == "started" else str(last.data["status"])
    return Outcome(
        run=name,
        changes=began["trial"]["changes"],
        state=state,
        error="" if state != "failed" else _why(last, ends),
        began=events[0].time,
        seconds=events[-1].time - events[0].time,
        computed=[n for n, e in ends.items() if e.kind == "commit"],
        reused=[n for n, e in ends.items() if e.kind == "reuse"],
        made={
            edge: KINDS[made[step]["artifact"]](made[step].get("uri", ""), made[step]["digest"], made[step]["about"])
            for edge, step in names.items()
            if step in made
        },
        measures=_measured(storage, _rested(events)),
    )


def _measured(storage: Storage, rested: Sequence[Event]) -> Mapping[str, float]:
    """What a step measured last before it rested."""
    lines = [one for one in measured(storage, rested[-1].data["log"]) if "measures" in one] if rested else []
    return lines[-1]["measures"] if lines else {}


def _why(last: Event, ends: Mapping[str, Event]) -> str:
    """Why a trial failed: the first step that did, or why it had no plan."""
    failed = [e for e in ends.values() if e.kind == "fail"]
    return str(last.data.get("why") or "") or "; ".join(f"{e.step}: {e.data['sentence']}" for e in failed)
