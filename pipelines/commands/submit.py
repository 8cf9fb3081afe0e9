"""`lfm submit`: run a pipeline on a cluster that goes on with it by itself."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict

from cluster.jobs import GOES_ON, Jobs, NoDashboard, Versions, taken
from cluster.machines import located
from cluster.package import Package, uri_of
from lfm.errors import LfmError
from pipelines import stops
from pipelines.beginning import described, inputs_of
from pipelines.commands._output import printed
from pipelines.commands._planned import read_plan
from pipelines.following import drivers, follow
from pipelines.interrupts import INTERRUPTED
from pipelines.lineage import Event, history, lives, states
from pipelines.plan import Plan
from pipelines.profiles import read_profile, records
from pipelines.storage.base import Storage
from pipelines.submission import entrypoint, key_of, packed, run_of
from pipelines.tracking.outbox import tracking
from pipelines.view import view

EXITS = {"done": 0, "failed": 1, "interrupted": INTERRUPTED}


class JobEnded(LfmError, RuntimeError):
    """A job whose driver did not write down how it ended."""

    def __init__(self, run: str, job: str, said: str) -> None:
        super().__init__(run, job, said)
        self.run, self.job, self.said = run, job, said

    def __str__(self) -> str:
        return (
            f"run {self.run!r}: job {self.job!r} ended and said {self.said!r}, expected it to write down its end. "
            "Submit it again, and it goes on where it was."
        )


def act(arguments: Namespace) -> int:
    """Run a pipeline on a cluster."""
    profile = read_profile(arguments.cluster)
    made, storage = read_plan(arguments, profile=profile)
    if arguments.mlflow or profile.mlflow:
        tracking(arguments.mlflow or profile.mlflow, storage)  # says what is wrong with it before anything travels
    jobs = Jobs(located(profile, records()))
    Versions.here().check(profile.name, jobs.versions())
    key = key_of({n: described(made, n) for n in made.steps}, inputs_of(made), profile)
    run = run_of(storage, key, made.spec.name)
    words = entrypoint(arguments, made, profile, storage, run)
    before = len(drivers(storage, run))

    def over(job: str) -> bool:
        """Whether the run's end, which its driver wrote with the same clock, is this job's."""
        own = drivers(storage, run)
        return bool(own) and own[-1][-1].kind == "finished" and own[-1][-1].time > jobs.began(job)

    def start(job: str) -> bool:
        package = packed(arguments.pipeline, arguments.cluster, made)
        _uploaded(storage, package)
        stops.withdraw(storage, run)
        labels = {f"lfm.{name}": value for name, value in words.labels.items()}
        return jobs.submit(
            job, str(words), package=uri_of(storage.uri, package.key), metadata={"lfm.run": run, **labels}
        )

    try:
        job, new = taken(jobs, run, start, over=over)
    except KeyboardInterrupt:
        _say(f"run {run} may have been submitted or not: the same 'lfm submit' follows it, or submits it.")
        return INTERRUPTED
    if not new and before and drivers(storage, run)[-1][-1].kind != "finished":
        before -= 1  # what it has written down already is news here
    _say(f"run {run}: {'submitted' if new else 'goes on already'} as job {job} on cluster {profile.name}")
    if arguments.detach:
        _say(_ways(run, arguments.cluster))
        return printed({"run": run, "job": job, "submitted": new}) if arguments.json else 0
    return _followed(run, job, jobs, made, storage, before, arguments)


def _uploaded(storage: Storage, package: Package) -> None:
    new = storage.put_if_absent(package.key, package.data)
    _say(f"{package}: {'uploaded' if new else 'there already'}")


def _followed(run: str, job: str, jobs: Jobs, made: Plan, storage: Storage, before: int, arguments: Namespace) -> int:
    """Show a run until it ends; Ctrl-C ends only that."""

    def goes_on() -> bool:
        try:
            return jobs.state(job) in GOES_ON
        except NoDashboard:  # the way there may be down, or the cluster; the driver tells storage that it lives
            return lives(storage, run)

    try:
        with view(made, storage, json_follows=arguments.json) as show:
            seen = follow(storage, run, before, watch=show, lives=goes_on)
    except KeyboardInterrupt:
        _say(f"run {run} goes on. {_ways(run, arguments.cluster)}")
        return INTERRUPTED
    if not seen or seen[-1].kind != "finished":
        raise JobEnded(run, job, _last_words(jobs, job))
    return _ended(run, job, seen, storage, made, arguments)


def _ended(run: str, job: str, seen: Sequence[Event], storage: Storage, made: Plan, arguments: Namespace) -> int:
    said = str(seen[-1].data["status"])
    if arguments.json:
        now = states(history(storage, run), made.steps)
        printed({"run": run, "job": job, "status": said, "steps": {n: asdict(s) for n, s in now.items()}})
    return EXITS[said]


def _last_words(jobs: Jobs, job: str) -> str:
    try:
        return jobs.last_words(job)
    except NoDashboard:
        return "nothing, for its cluster does not answer"


def _ways(run: str, profile: str) -> str:
    """How to come back to a run."""
    return (
        f"See 'lfm show {run} --cluster {profile}' and 'lfm logs {run} --cluster {profile}', and end it with "
        f"'lfm stop {run} --cluster {profile}'; the same 'lfm submit' follows it again."
    )


def _say(what: str) -> None:
    print(what, file=sys.stderr)
