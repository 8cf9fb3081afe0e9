"""`lfm run`: run a pipeline."""

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from cluster.pool import opened
from lfm.errors import LfmError
from pipelines.beginning import started
from pipelines.commands._output import printed
from pipelines.commands._planned import read_plan
from pipelines.lineage import Event, Journal, history, new_run, states
from pipelines.plan import Plan, of_run
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
    made, storage = read_plan(arguments, forced=forced)
    return begin(made, storage, arguments, forced=forced, retries=arguments.retries)


def begin(made: Plan, storage: Storage, arguments: Namespace, *, forced: tuple[str, ...] = (), retries: int = 0) -> int:
    """Start a new run of a plan, here or in the background, and return the exit code."""
    mlflow = tracking(arguments.mlflow, storage)
    if arguments.detach:
        return _detached(made, storage, arguments)
    journal = Journal.claim(storage, arguments.name or new_run(made.spec.name))
    return drive_to_end(made, storage, journal, arguments, forced=forced, retries=retries, mlflow=mlflow)


def drive_to_end(
    made: Plan,
    storage: Storage,
    journal: Journal,
    arguments: Namespace,
    *,
    forced: tuple[str, ...],
    retries: int,
    mlflow: str,
) -> int:
    """Drive a plan under a claimed journal, show it, and return the exit code."""
    made = of_run(made, journal.run)
    until = getattr(arguments, "until", "")
    begun = started(
        made, journal.run, retries=retries, mlflow=mlflow, forced=forced, until=until, address=arguments.address
    )
    with Mirrored(storage, journal.run, mlflow) as mirror, view(made, storage, json_follows=arguments.json) as show:

        def watch(events: Sequence[Event]) -> None:
            show(events)
            mirror(events)

        journal.write([begun])
        watch([begun])
        said = drive(
            made,
            Store(storage),
            journal,
            connect=partial(opened, arguments.address),
            stays=arguments.address == "local",
            forced=forced,
            retries=retries,
            watch=watch,
        )
    return _ended(journal.run, said, storage, made, arguments)


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
