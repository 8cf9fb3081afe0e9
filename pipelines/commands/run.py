"""`lfm run`: run a pipeline."""

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from cluster.package import package_here
from cluster.pool import opened
from cluster.profile import Profile
from lfm.errors import LfmError
from pipelines import stops
from pipelines.beginning import started
from pipelines.commands._output import printed
from pipelines.commands._planned import estimated, prospects, read_plan
from pipelines.commands._stored import profile_in
from pipelines.limits import Budget, Limits, Spent, spent
from pipelines.lineage import Event, Journal, begun, history, new_run, states
from pipelines.plan import Plan, of_run
from pipelines.printing import Unwritten, logged
from pipelines.profiles import reached
from pipelines.run import POLL_S, run as drive
from pipelines.storage.base import Storage
from pipelines.store import Store
from pipelines.tracking.mirror import Mirrored
from pipelines.tracking.outbox import tracking
from pipelines.view import view


class DriverDied(LfmError, RuntimeError):
    """A detached run that ended before it could say how."""

    def __init__(self, run: str, said: str) -> None:
        super().__init__(run, said)
        self.run, self.said = run, said

    def __str__(self) -> str:
        return f"run {self.run!r}: its driver ended and said {self.said!r}, expected endpoints. Go on with lfm resume."


def act(arguments: Namespace) -> int:
    """Run a pipeline."""
    forced = tuple(arguments.force)
    profile = profile_in(arguments)
    if arguments.max_cost and profile is None:
        raise NoPrices(arguments.max_cost)
    made, storage = read_plan(arguments, forced=forced, profile=profile)
    if profile is not None and arguments.address == "local":
        arguments.address = reached(profile).address
    return begin(made, storage, arguments, forced=forced, retries=arguments.retries, profile=profile)


class NoPrices(LfmError, ValueError):
    """A limit on what a run may cost, of machines of which nobody knows what they cost."""

    def __init__(self, max_cost: float) -> None:
        super().__init__(max_cost)
        self.max_cost = max_cost

    def __str__(self) -> str:
        return f"--max-cost {self.max_cost:g}: nothing says what machines cost, expected --cluster with a profile."


def begin(
    made: Plan,
    storage: Storage,
    arguments: Namespace,
    *,
    forced: tuple[str, ...] = (),
    retries: int = 0,
    profile: Profile | None = None,
) -> int:
    """Start a run of a plan, here or in the background, and return the exit code.

    One whose name the store has already goes on where it was: so a job may be tried again by whoever has started it.

    Raises:
        RunStopped: It was stopped, and nobody has said since that it is to go on.
    """
    mlflow = tracking(arguments.mlflow, storage)
    if arguments.detach:
        return _detached(made, storage, arguments)
    name = arguments.name or new_run(made.spec.name)
    if arguments.name and stops.asked(storage, name):
        raise stops.RunStopped(name)
    again = bool(arguments.name) and begun(storage, name)
    journal = Journal.claim(storage, name, waiting=partial(print, file=sys.stderr))
    with _kept(storage, journal, inside=bool(arguments.name) and profile is not None):
        return drive_to_end(
            made,
            storage,
            journal,
            arguments,
            forced=() if again else forced,
            retries=retries,
            mlflow=mlflow,
            profile=profile,
        )


@contextmanager
def _kept(storage: Storage, journal: Journal, *, inside: bool) -> Iterator[None]:
    """What a driver inside of a cluster prints is kept beside its journal: the cluster's own logs go with it."""
    if not inside:
        yield
        return
    key = f"runs/{journal.run}/driver/{journal.epoch:06}.log"
    print(f"run {journal.run}: what its driver prints is in {storage.uri}/{key}", flush=True)
    with logged(storage, key, Unwritten()):
        yield


def drive_to_end(
    made: Plan,
    storage: Storage,
    journal: Journal,
    arguments: Namespace,
    *,
    forced: tuple[str, ...],
    retries: int,
    mlflow: str,
    profile: Profile | None = None,
) -> int:
    """Drive a plan under a claimed journal, show it, and return the exit code."""
    budget = _budget(arguments, profile, storage, journal.run)
    made = of_run(made, journal.run)
    until = getattr(arguments, "until", "")
    foreseen = {} if profile is None else {"estimate": _foreseen(made, storage, profile, forced)}
    first = started(
        made,
        journal.run,
        retries=retries,
        mlflow=mlflow,
        forced=forced,
        until=until,
        address=arguments.address,
        **_accounts(arguments, profile),
        **foreseen,
    )
    with Mirrored(storage, journal.run, mlflow) as mirror, view(made, storage, json_follows=arguments.json) as show:

        def watch(events: Sequence[Event]) -> None:
            show(events)
            mirror(events)

        journal.write([first])
        watch([first])
        said = drive(
            made,
            Store(storage),
            journal,
            connect=partial(opened, arguments.address, profile.capacity() if profile and profile.grows else None),
            stays=arguments.address == "local",
            forced=forced,
            retries=retries,
            budget=budget,
            priority=getattr(arguments, "priority", 0),
            watch=watch,
        )
    return _ended(journal.run, said, storage, made, arguments)


def _budget(arguments: Namespace, profile: Profile | None, storage: Storage, run: str) -> Budget:
    """What the run may spend, and what it has spent, where that matters."""
    limits = Limits.of(arguments)
    before = spent(history(storage, run), profile) if limits.any else Spent()
    return Budget(limits=limits, profile=profile, before=before)


def _accounts(arguments: Namespace, profile: Profile | None) -> dict[str, Any]:
    """What a journal keeps of whom a run is for and what machines cost; nothing where nobody has said."""
    told = {
        "priority": getattr(arguments, "priority", 0),
        "labels": dict(getattr(arguments, "labels", ())),
        "deadline_s": getattr(arguments, "deadline", 0.0),
        "max_cost": getattr(arguments, "max_cost", 0.0),
        "profile": asdict(profile) if profile is not None else {},
        "package": package_here(),
    }
    return {name: value for name, value in told.items() if value}


def _foreseen(made: Plan, storage: Storage, profile: Profile, forced: Collection[str]) -> dict[str, Any]:
    """What the plan says that the run will take, so that it can be seen beside what it took."""
    state = {n: "runs" if n in forced else said for n, said in prospects(made, storage).items()}
    return estimated(made, storage, profile, state).json


def _ended(run: str, said: str, storage: Storage, made: Plan, arguments: Namespace) -> int:
    if arguments.json:
        now = states(history(storage, run), made.steps)
        printed({"run": run, "status": said, "steps": {n: asdict(s) for n, s in now.items()}})
    return {"done": 0, "serving": 0, "failed": 1, "interrupted": 130}[said]


def _detached(made: Plan, storage: Storage, arguments: Namespace) -> int:
    """Have a process of its own drive the run, and show it until its endpoints are up or it ends."""
    run = new_run(made.spec.name)
    words = [w for w in arguments.words if w != "--detach"]
    log = storage.scratch() / "driver.log"
    with log.open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *words, "--as", run],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    seen: list[Event] = []
    try:
        with view(made, storage, json_follows=arguments.json) as watch:
            while not any(e.kind in ("serving", "finished") for e in seen):
                ended = child.poll() is not None
                events = history(storage, run)
                watch(events[len(seen) :])
                seen = events
                if ended and not any(e.kind == "finished" for e in seen):
                    raise DriverDied(run, log.read_text(errors="replace").strip().rpartition("\n")[2])
                time.sleep(0 if ended else POLL_S)
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        return 130
    said = "serving" if seen[-1].kind == "serving" else str(seen[-1].data["status"])
    return _ended(run, said, storage, made, arguments)
