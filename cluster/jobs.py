"""Ray Jobs: the only place that hands a run's driver to a cluster, asks what became of it, and ends it."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from cluster.manifests.job import runtime_env
from cluster.profile import Profile
from cluster.tokens import authenticated, outside
from lfm.errors import LfmError

State = Literal["unknown", "pending", "running", "stopped", "succeeded", "failed"]
"""What Ray says of a job; ``unknown`` where it has none of that name."""
GOES_ON: tuple[State, ...] = ("pending", "running")

VERSIONS = "lfm-versions"  # jobs that say what is installed; an answer stays as long as the cluster does
ASK_S, ANSWER_S = 0.5, 300.0
OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
SAYS = (
    "import json, sys; from importlib.metadata import distributions as d; "
    "v = {i.name: i.version for i in d()}; "
    "print(json.dumps({'ray': v.get('ray', ''), 'python': '%d.%d' % sys.version_info[:2], "
    "'lfm': v.get('learn-from-model', '')}))"
)


class NoDashboard(LfmError, ConnectionError):
    """A dashboard of Ray's that takes no jobs."""

    def __init__(self, name: str, where: str, what: str) -> None:
        super().__init__(name, where, what)
        self.name, self.where, self.what = name, where, what

    def __str__(self) -> str:
        return (
            f"cluster {self.name!r}: {self.what}, expected Ray's dashboard at {self.where!r}. See that the cluster is "
            "up, and that the profile's 'dashboard' says where (in Kubernetes, forward port 8265 of its head)."
        )


class OtherVersions(LfmError, RuntimeError):
    """A cluster that would not run what is planned here."""

    def __init__(self, name: str, there: str, here: str) -> None:
        super().__init__(name, there, here)
        self.name, self.there, self.here = name, there, here

    def __str__(self) -> str:
        return f"cluster {self.name!r}: it has {self.there}, expected {self.here} as here. Change one of them."


class JobRefused(LfmError, RuntimeError):
    """What Ray does not do with a job."""

    def __init__(self, job: str, what: str) -> None:
        super().__init__(job, what)
        self.job, self.what = job, what

    def __str__(self) -> str:
        return f"job {self.job!r}: Ray said {self.what!r}, expected it to take it. Look at the cluster's dashboard."


@dataclass(frozen=True, slots=True)
class Versions:
    """What is installed: Ray, Python (``3.11``) and this project, which is empty where it comes with the job."""

    ray: str
    python: str
    lfm: str = ""

    @classmethod
    def here(cls) -> "Versions":
        """In this process."""
        try:
            own = version("learn-from-model")
        except PackageNotFoundError:
            own = ""
        return cls(version("ray"), "{}.{}".format(*sys.version_info), own)

    def check(self, name: str, there: "Versions") -> None:
        """Raise `OtherVersions` unless what a cluster has fits: the same, and this project, if it is there at all."""
        names = {"ray": "Ray", "python": "Python", "lfm": "lfm"}
        pairs = {n: (getattr(there, f), getattr(self, f)) for f, n in names.items()}
        other = {n: (t, h) for n, (t, h) in pairs.items() if t != h and (n != "lfm" or t)}
        if other:
            said = (", ".join(f"{n} {pair[i] or 'none'}" for n, pair in other.items()) for i in (0, 1))
            raise OtherVersions(name, *said)


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, profile: Profile) -> None:
        """Connect.

        Args:
            profile: Says where the dashboard is, and where its token.

        Raises:
            NoToken: The token is not where the profile says.
            TokenInCluster: The same where a secret of Kubernetes has it.
            NoDashboard: Nothing answers, or it takes no such token.
        """
        self.profile = profile
        if not profile.dashboard:
            raise NoDashboard(profile.name, "http://HOST:8265", "the profile names no dashboard")
        headers = _headers(outside(profile, os.environ))
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when Ray is imported; the header says it all
        from ray.job_submission import JobSubmissionClient

        with self._answered(), _without(OVERRIDES):
            self._client = JobSubmissionClient(profile.dashboard, headers=headers)

    def versions(self) -> Versions:
        """What is installed there."""
        number = 1
        while (state := self.state(job := f"{VERSIONS}-{number}")) in ("failed", "stopped"):
            number += 1  # what was wrong then may be right now
        if state == "unknown":
            self.submit(job, f'python -c "{SAYS}"')
        ended = self.ended(job)
        lines = [line for line in self.log(job).splitlines() if line.startswith("{")]
        if ended != "succeeded" or not lines:
            raise JobRefused(job, self.why(job))
        return Versions(**json.loads(lines[-1]))

    def submit(
        self, job: str, entrypoint: str, *, package: str = "", metadata: Mapping[str, str] | None = None
    ) -> bool:
        """Hand a job over.

        Args:
            job: Its name, of which there is one: whoever is the second to take it, hears so.
            entrypoint: What a shell runs.
            package: The URI of what is unpacked where it runs, and where its tasks do.
            metadata: What Ray's dashboard shows beside it.

        Returns:
            Whether it is this call's job; False where there was one of that name.
        """
        environment: dict[str, Any] = {}
        if package:
            environment = {**runtime_env(package, self.profile.pip), "env_vars": dict(self.profile.environment)}
        return self._submitted(job, entrypoint, environment, metadata or {})

    def submit_beside(self, other: str, job: str, entrypoint: str) -> bool:
        """The same with the package and all else that another job was given.

        Raises:
            JobRefused: The cluster does not know that one any more.
        """
        info = self._info(other)
        if info is None:
            raise JobRefused(other, "it does not know it")
        return self._submitted(job, entrypoint, info.runtime_env or {}, info.metadata or {})

    def _submitted(
        self, job: str, entrypoint: str, environment: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> bool:
        with self._answered():
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job,
                    runtime_env=dict(environment),
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise JobRefused(job, _first_line(error)) from error
        return True

    def of_run(self, run: str) -> dict[int, State]:
        """The attempts at a run that the cluster knows of, by their number."""
        with self._answered():
            found = {str(j.submission_id): _state(j.status) for j in self._client.list_jobs()}
        numbers = {job: re.fullmatch(rf"{re.escape(run)}-attempt-(\d+)", job) for job in found}
        return {int(number[1]): found[job] for job, number in numbers.items() if number is not None}

    def state(self, job: str) -> State:
        """How a job is."""
        return _state(info.status) if (info := self._info(job)) is not None else "unknown"

    def ended(self, job: str) -> State:
        """The same once it has ended, or is still going on after `ANSWER_S`."""
        until = time.monotonic() + ANSWER_S
        while (state := self.state(job)) in GOES_ON and time.monotonic() < until:
            time.sleep(ASK_S)
        return state

    def began(self, job: str) -> float:
        """When it was submitted, in seconds since 1970 by the head's clock; 0 where nobody knows."""
        info = self._info(job)
        return (info.start_time or 0) / 1000 if info is not None else 0.0

    def why(self, job: str) -> str:
        """What Ray says of its end, or of what it waits for, in a line."""
        info = self._info(job)
        return _first_line(info.message or "nothing") if info is not None else "it does not know it"

    def log(self, job: str) -> str:
        """What it has printed; empty where the cluster has lost that."""
        with self._answered():
            try:
                return str(self._client.get_job_logs(job))
            except RuntimeError:
                return ""

    def last_words(self, job: str) -> str:
        """The last line of that; where there is none, what Ray says."""
        return self.log(job).strip().rpartition("\n")[2] or self.why(job)

    def stop(self, job: str) -> None:
        """Have its process end: it gets SIGTERM, and three seconds later SIGKILL."""
        with self._answered():
            try:
                self._client.stop_job(job)
            except RuntimeError as error:
                raise JobRefused(job, _first_line(error)) from error

    def _info(self, job: str) -> Any:
        with self._answered():
            try:
                return self._client.get_job_info(job)
            except RuntimeError as error:
                if "404" in str(error) or "does not exist" in str(error):
                    return None
                raise JobRefused(job, _first_line(error)) from error

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Say which cluster it is that does not answer, or whose token is another."""
        from ray.exceptions import AuthenticationError
        from requests import RequestException

        try:
            yield
        except LfmError:
            raise
        except (OSError, RequestException, AuthenticationError) as error:
            what = "it takes no such token" if isinstance(error, AuthenticationError) else _first_line(error)
            raise NoDashboard(self.profile.name, self.profile.dashboard, what) from error


def attempt(run: str, number: int) -> str:
    """What the job of a run's attempt is called, which is what keeps two submitters from starting it twice."""
    return f"{run}-attempt-{number}"


def due(attempts: Mapping[int, State]) -> tuple[int, bool]:
    """Which attempt at a run it is the turn of, and whether that one goes on already.

    Args:
        attempts: How those are that the cluster knows of.
    """
    last = max(attempts, default=0)
    return (last, True) if attempts.get(last) in GOES_ON else (last + 1, False)


def taken(
    jobs: Jobs, run: str, start: Callable[[str], bool], *, over: Callable[[str], bool] = lambda job: False
) -> tuple[str, bool]:
    """The job that goes on for a run, and whether it is this call that has started it.

    Args:
        jobs: Where.
        run: Its name.
        start: Submits the job of a name; False where somebody else was faster, who is then followed.
        over: Whether a job that goes on has nothing left to do but to end, which is waited for.
    """
    while True:
        number, there = due(jobs.of_run(run))
        job = attempt(run, number)
        if there and over(job):
            jobs.ended(job)
            continue
        if there:
            return job, False
        if start(job):
            return job, True


def _state(status: Any) -> State:
    found: State = str(getattr(status, "value", status)).lower()  # type: ignore[assignment]
    return found


def _headers(token: str) -> dict[str, str]:
    """What says to the dashboard who asks."""
    told = authenticated(os.environ, token)
    if told["RAY_AUTH_MODE"] == "disabled":
        return {}
    value = told.get("RAY_AUTH_TOKEN") or Path(told["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    return {"Authorization": f"Bearer {value}"}


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Variables are not there: Ray would take the address in them instead of the profile's."""
    kept = {n: os.environ.pop(n) for n in names if n in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _first_line(what: object) -> str:
    return str(what).strip().partition("\n")[0].rstrip(".")
