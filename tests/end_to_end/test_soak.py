"""The main job, killed at random again and again, comes to the end of a run that nothing happens to.

``make soak`` runs it. ``LFM_SOAK_MINUTES`` says for how long (20), ``LFM_SOAK_SEED`` repeats what one run did.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from pipelines.__main__ import ROOT
from pipelines.lineage import history, runs, states, status
from pipelines.storage.local import LocalStorage
from tests.end_to_end.test_distill_lora_merge_serve import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.soak]

MINUTES = float(os.environ.get("LFM_SOAK_MINUTES", "20"))
SEED = int(os.environ.get("LFM_SOAK_SEED", random.SystemRandom().randrange(10**6)))
QUIET_S = (1.0, 25.0)  # between two kills
WAIT_S = 600
EFFECTS = ("registered", "endpoint")  # they act outside of the store: where they were done is in what they say


class Job:
    """The recipe in a user's folder, driven on and on."""

    def __init__(self, folder, temporary):
        self.folder, self.temporary = folder, temporary
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.storage = LocalStorage(folder / ".lfm")
        self.driver = None

    def goes_on(self):
        """Start the run, or the next driver of it."""
        changes = [w for change in (*SMALL, f"endpoint.port={self.port}") for w in ("--set", change)]
        fresh = not runs(self.storage)
        words = ["run", "distill_lora_merge_serve", "--retries", "5", *changes] if fresh else ["resume", "last"]
        with (self.folder / "out.txt").open("ab") as out:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "pipelines", *words, "--mlflow", "none"], cwd=self.folder,
                env={**os.environ, "TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT)},
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def said(self):
        names = runs(self.storage)
        return status(self.storage, names[-1], history(self.storage, names[-1])) if names else "none"

    def below(self):
        """The driver's processes, the warden left out: it is there to outlive them."""
        with contextlib.suppress(psutil.Error):
            return [
                p for p in psutil.Process(self.driver.pid).children(recursive=True) if "cluster.warden" not in _line(p)
            ]
        return []

    def digests(self):
        (run,) = runs(self.storage)
        events = history(self.storage, run)
        made = states(events, events[0].data["steps"])
        assert {s.state for s in made.values()} <= {"done", "reused"}, made
        return {n: s.data["digest"] for n, s in made.items() if n not in EFFECTS}

    def comes_to_its_end(self):
        """Drive it until its endpoint is up, then end that."""
        until = time.monotonic() + WAIT_S
        while self.said() != "serving":
            assert time.monotonic() < until, self.output()
            if self.driver.poll() is not None:
                self.goes_on()
            time.sleep(0.2)
        self.driver.terminate()
        assert self.driver.wait(WAIT_S) == 0, self.output()

    def output(self):
        return (self.folder / "out.txt").read_text()[-4000:]


@pytest.fixture
def job(tmp_path):
    with contextlib.ExitStack() as stack:
        made = []

        def job_(name):
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="t-", dir="/tmp"))
            (tmp_path / name).mkdir()
            made.append(Job(tmp_path / name, Path(temporary)))
            return made[-1]

        yield job_
        for one in made:
            if one.driver is not None and one.driver.poll() is None:
                one.driver.kill()
                one.driver.wait()


def test_it_comes_to_the_same_end_whoever_is_killed(job):
    sys.stdout.write(f"LFM_SOAK_SEED={SEED}\n")
    undisturbed = job("undisturbed")
    undisturbed.goes_on()
    undisturbed.comes_to_its_end()
    wanted = undisturbed.digests()
    drawn, ends, finished, kills = random.Random(SEED), time.monotonic() + 60 * MINUTES, 0, 0
    while time.monotonic() < ends:
        disturbed = job(f"disturbed-{finished}")
        disturbed.goes_on()
        while time.monotonic() < ends and disturbed.said() != "serving":
            _wait(disturbed, drawn.uniform(*QUIET_S))
            kills += _killed(disturbed, drawn)
            if disturbed.driver.poll() is not None:
                disturbed.goes_on()
        disturbed.comes_to_its_end()
        assert disturbed.digests() == wanted
        # Torch keeps a cache there, which is nobody's leftover.
        assert [*disturbed.temporary.glob("lfm-*"), *disturbed.storage.scratches.iterdir()] == []
        finished += 1
        sys.stdout.write(f"{finished} came to the same end, after {kills} kills in all\n")
    assert finished


def _wait(job, seconds):
    """Let it work for a while, or until it serves or its driver has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and job.driver.poll() is None and job.said() != "serving":
        time.sleep(0.2)


def _killed(job, drawn):
    """Kill the driver, or a process below it: Ray's own, a step's, a worker's; whether somebody was there."""
    below = job.below()
    steps = [p for p in below if _line(p).startswith("ray::") and "IDLE" not in _line(p)]
    driver = [psutil.Process(job.driver.pid)] if job.driver.poll() is None else []
    among = drawn.choice([driver, steps, below])
    if not among:
        return False
    victim = drawn.choice(among)
    with contextlib.suppress(psutil.Error):
        sys.stdout.write(f"kill {_line(victim)[:60]!r}\n")
        victim.send_signal(drawn.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        return True
    return False


def _line(process):
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:  # it ended since it was listed
        return ""
