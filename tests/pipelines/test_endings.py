"""However a run ends: it can go on, and nothing of it is left."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest

from pipelines.__main__ import ROOT
from pipelines.lineage import history, runs, status
from pipelines.storage.local import LocalStorage

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OWN = '''
"""An operator that counts how often it is done, and may wait with children that try to get away."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace


@operator()
def noop(work: Workspace, *, after: Sequence[Dataset] = (), count: str, hold: str = "", fail: bool = False) -> Dataset:
    """Wait for as long as `hold` is there."""
    with open(count, "a") as file:
        file.write("x")
    if Path(hold).is_file():
        children = [subprocess.Popen(["sleep", "1000"], start_new_session=new) for new in (False, True)]
        escapes = ["sh", "-c", "setsid sleep 1000 > /dev/null & echo $!"]
        orphan = subprocess.run(escapes, check=True, stdout=subprocess.PIPE).stdout
        pids = [os.getpid(), *(c.pid for c in children), int(orphan)]
        Path(hold + ".new").write_text(" ".join(map(str, pids)))
        os.rename(hold + ".new", hold + ".pids")
    while Path(hold).is_file():
        pass
    if fail:
        raise ValueError("asked to")
    file = work.scratch / "data.txt"
    file.write_text(Path(count).name)
    return work.save(Dataset, file)
'''
PIPELINE = """
name: endings
uses: [own.py]
inputs: {text: {dataset: text.txt}}
steps:
  a: {operator: noop, inputs: {after: [text]}, params: {count: FOLDER/a}}
  b: {operator: noop, inputs: {after: [a]}, params: {count: FOLDER/b, hold: FOLDER/hold}}
"""
LIMIT_S = 60  # within which nothing may be left
PATIENCE_S = 120  # for a run to get where it is wanted, on a machine that has much else to do
CANARY = "LFM_TESTS_CANARY"


def until(true, limit=PATIENCE_S):
    """Wait for something, and return for how long."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < limit
        time.sleep(0.02)
    return time.monotonic() - began


def lives(pid):
    """Whether it does; who waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Typed:
    """An `lfm` command as a process group of its own, as a terminal starts it, and whatever comes of it."""

    def __init__(self, user, *words):
        self.out = user.folder / f"{words[0]}.out"
        # Every process that comes of it inherits this, wherever it gets away to.
        self.canary = f"{CANARY}={uuid.uuid4().hex}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(user.temporary)}
        environment |= dict([self.canary.split("=")])
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines", *words, "--mlflow", "none"],
                cwd=user.folder, env=environment, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def gets_to(self, true):
        """Wait until it has come somewhere."""

        def there():
            assert self.process.poll() is None, self.out.read_text()
            return true()

        until(there)

    def ended(self, name):
        """Wait until it and all that came of it have ended, say how long that took, and return its exit code."""
        took = until(lambda: self.process.poll() is not None)
        longer = until(lambda: not self.left(), LIMIT_S)
        sys.stdout.write(f"{name}: ended after {took:.1f} s, the last of it {longer:.1f} s later\n")
        return self.process.returncode

    def left(self):
        """What lives of it."""
        found = []
        for one in Path("/proc").glob("[1-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if self.canary.encode() in (one / "environ").read_bytes().split(b"\0"):
                    found.append(int(one.name))
        return found


class User:
    """A user's folder with the pipeline, and what their runs leave."""

    def __init__(self, folder, temporary):
        self.folder, self.temporary = folder, temporary
        self.hold, self.pids = folder / "hold", folder / "hold.pids"
        (folder / "own.py").write_text(OWN)
        (folder / "text.txt").write_text("text")
        (folder / "endings.yaml").write_text(PIPELINE.replace("FOLDER", str(folder)))
        self.storage = LocalStorage(folder / ".lfm")
        self.commands = []

    def types(self, *words):
        self.commands.append(Typed(self, *words))
        return self.commands[-1]

    def goes_on(self):
        """Begin the one run, or go on with it."""
        return self.types(*(("resume", "last") if runs(self.storage) else ("run", "endings.yaml")))

    def status(self):
        (run,) = runs(self.storage)
        return status(self.storage, run, history(self.storage, run))

    def left_nothing(self):
        """Whether there is no temporary file."""
        left = [*self.temporary.iterdir(), *self.storage.scratches.iterdir()]
        sys.stdout.write("".join(f"{path}\n" for path in left))
        return left == []

    def starts(self, inside):
        """Whether Ray's folder has got something."""
        return any(self.temporary.glob(f"lfm-ray-*/{inside}"))


@pytest.fixture
def user(tmp_path):
    # Short: Ray's sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as temporary:
        made = User(tmp_path, Path(temporary))
        yield made
        for pid in (p for typed in made.commands for p in typed.left()):  # where a test has failed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def killed(typed):
    typed.process.kill()


def told_to_end(typed):
    typed.process.terminate()


def interrupted(typed):
    """As a terminal does: everybody hears of it."""
    os.killpg(typed.process.pid, signal.SIGINT)


def interrupted_twice(typed):
    interrupted(typed)
    until(lambda: "run interrupted" in typed.out.read_text())
    interrupted(typed)


def test_whatever_ends_a_run_during_a_step_it_goes_on_and_nothing_is_left(user):
    for end, code in ((interrupted, 130), (told_to_end, 130), (killed, -signal.SIGKILL), (interrupted_twice, 130)):
        user.hold.touch()
        user.pids.unlink(missing_ok=True)
        typed = user.goes_on()
        typed.gets_to(user.pids.exists)
        end(typed)
        assert typed.ended(end.__name__) == code
        assert user.status() == "interrupted"
    user.pids.unlink()
    typed = user.goes_on()
    typed.gets_to(user.pids.exists)  # who was killed had left its scratch
    user.hold.unlink()
    assert typed.ended("done") == 0, "its step has left children behind"
    assert (user.status(), (user.folder / "a").read_text()) == ("done", "x")
    assert user.left_nothing()


def test_whatever_ends_a_run_while_it_starts_it_goes_on_and_nothing_is_left(user):
    for end, code, inside in (
        (interrupted, 130, ""),
        (told_to_end, 130, "session_2*"),
        (killed, -signal.SIGKILL, "session_2*/logs/gcs_server.out"),
        (interrupted, 130, "session_2*/sockets/raylet"),
    ):
        typed = user.goes_on()
        typed.gets_to(lambda inside=inside: user.starts(inside))
        end(typed)
        assert typed.ended(f"{end.__name__} at {inside!r}") == code
        assert user.status() == "interrupted"
        assert user.left_nothing()


def test_a_run_that_fails_leaves_nothing(user):
    user.hold.touch()
    typed = user.types("run", "endings.yaml", "--set", "b.fail=true")
    typed.gets_to(user.pids.exists)
    user.hold.unlink()
    assert typed.ended("failed") == 1
    assert user.status() == "failed"
    assert user.left_nothing()


def test_a_driver_that_is_killed_leaves_nothing_on_a_ray_that_stays(user, one_ray):
    import ray

    user.hold.touch()
    typed = user.types("run", "endings.yaml", "--address", ray.get_runtime_context().gcs_address)
    typed.gets_to(user.pids.exists)
    pids = [int(p) for p in user.pids.read_text().split()]
    typed.process.kill()
    typed.ended("killed")
    took = until(lambda: not any(map(lives, pids)), LIMIT_S)
    sys.stdout.write(f"its step on the other Ray {took:.1f} s later\n")
    until(lambda: ray.available_resources().get("CPU") == one_ray.cpus, LIMIT_S)
    assert user.status() == "interrupted"
