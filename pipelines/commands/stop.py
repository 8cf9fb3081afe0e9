"""`lfm stop`: end a run and its endpoints."""

import os
import shlex
import signal
import time
from argparse import Namespace
from typing import Any

import psutil

from cluster.connect import cluster
from cluster.jobs import GOES_ON, Jobs, attempt
from cluster.machines import located
from cluster.processes import LEASE_S
from cluster.profile import Profile
from operators.serving import take_down
from pipelines import stops
from pipelines.commands._stored import storage_and_profile
from pipelines.findings import endpoints
from pipelines.following import LOOK_S
from pipelines.limits import DRAIN_S
from pipelines.lineage import Event, driver, find_run, history, states, status
from pipelines.profiles import records
from pipelines.storage.base import Storage

GOING_ON = ("running", "serving")


def act(arguments: Namespace) -> int:
    """End a run: its driver writes down how it ended, and takes its cluster with it.

    One of this machine gets SIGTERM. One of another finds in the store that it is to end.
    """
    storage, profile = storage_and_profile(arguments)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    pid = driver(storage, name)
    elsewhere = pid is None and status(storage, name, events) in GOING_ON
    if pid is not None and not _ended(name, pid):
        return 1
    if elsewhere and not _ended_elsewhere(storage, name, profile):
        return 1
    left = _left_up(history(storage, name))
    if left and not _taken_down(left, events[0].data["address"], name, storage, profile):
        return 1
    going_on = pid is not None or elsewhere or left
    print(f"run {name} stopped" if going_on else f"run {name} is not going on")
    return 0


def _ended_elsewhere(storage: Storage, name: str, profile: Profile | None) -> bool:
    """Whether a driver of another machine has ended; with a profile its job is ended where it does not answer."""
    stops.ask(storage, name)
    drain_s = DRAIN_S if profile is None else profile.drain_s
    print(f"run {name}: its driver was asked to end, for which it has {drain_s:.0f} s", flush=True)
    until = time.monotonic() + LEASE_S + drain_s
    while status(storage, name, history(storage, name)) in GOING_ON:
        if time.monotonic() > until:
            return _forced(name, profile)
        time.sleep(LOOK_S)
    return True


def _forced(name: str, profile: Profile | None) -> bool:
    if profile is None:
        print(f"run {name}: its driver lives and does not end, expected it to. Name its cluster with --cluster.")
        return False
    jobs = Jobs(located(profile, records()))
    for number, state in jobs.of_run(name).items():
        if state in GOES_ON:
            jobs.stop(attempt(name, number))
    print(f"run {name}: its job was ended, because its driver did not answer")
    return True


def _taken_down(left: list[Any], address: str, name: str, storage: Storage, profile: Profile | None) -> bool:
    """Whether endpoints that a run has left up are down: a cluster that is not reached from here does it itself."""
    if profile is None or address != "auto":
        with cluster(address):
            for endpoint in left:
                take_down(endpoint["name"], endpoint["model"])
        return True
    jobs = Jobs(located(profile, records()))
    job = f"{name}-stop-{os.urandom(4).hex()}"
    words = ("python", "-m", "pipelines", "stop", name, "--store", storage.uri)
    jobs.submit_beside(attempt(name, max(jobs.of_run(name), default=0)), job, shlex.join(words))
    if jobs.ended(job) == "succeeded":
        return True
    print(f"run {name}: job {job!r} did not take its endpoints down and said {jobs.last_words(job)!r}, expected it to.")
    return False


def _ended(name: str, pid: int) -> bool:
    """Whether the run's driver has ended after it was told to."""
    try:
        os.kill(pid, signal.SIGTERM)
        psutil.Process(pid).wait(timeout=60)
    except (ProcessLookupError, psutil.NoSuchProcess):
        pass
    except psutil.TimeoutExpired:
        print(f"run {name}: process {pid} has not ended after 60 s, expected it to. End it with kill -9 {pid}.")
        return False
    return True


def _left_up(events: list[Event]) -> list[Any]:
    """The endpoints on a cluster that was there before the run; those on a Ray of its own ended with it."""
    if events[0].data["address"] == "local":
        return []
    return list(endpoints(states(events, events[0].data["steps"])))
