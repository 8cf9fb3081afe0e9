"""A folder for a Ray of our own, and a process that outlives it to see that nothing of it stays.

Every process of that Ray, and whatever these start, inherits an environment variable that names the folder. Its warden
(`cluster.warden`) waits for the driver to end, however it does, then ends who carries that name and deletes the folder.
Driver and warden share a lock on it: where nobody holds it both are dead, and the next command does the same.
"""

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "LFM_CLUSTER"
PREFIX = "lfm-ray-"
WAIT_S = 10.0  # how long a driver waits for its warden at most; that one goes on
LOOK_S = 0.05
TRIES = 20


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """A new folder that goes with the block, or with this process, and with it everything that `marked` has begun."""
    folder, lock = _made()
    warden = None
    try:
        warden = subprocess.Popen(
            [sys.executable, "-m", "cluster.warden", str(folder)],
            env={k: v for k, v in os.environ.items() if k != MARK},  # a run that a step started looks after itself
            stdin=subprocess.PIPE,  # closed when this process dies
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C is for the driver
        )
        yield folder
    finally:
        if warden is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            assert warden.stdin is not None
            warden.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                warden.wait(WAIT_S)
        os.close(lock)


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[None]:
    """What this process starts meanwhile belongs to the Ray whose home is `folder`."""
    before = os.environ.get(MARK)
    os.environ[MARK] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before


def clear() -> None:
    """Do what wardens have left undone that were killed too."""
    for folder in short_place().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or one that lives, or it went meanwhile
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end(folder)
            finally:
                os.close(lock)


def end(folder: Path) -> None:
    """End all processes that carry a folder's name, and delete it."""
    for _ in range(TRIES):
        looks = 0
        while looks < 2:  # who is about to become another program shows no environment for a moment
            killed = [_killed(process, folder) for process in Path("/proc").glob("[1-9]*")]
            looks = 0 if any(killed) else looks + 1
            time.sleep(LOOK_S)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():  # else somebody has written there on his way out
            return


def _killed(process: Path, folder: Path) -> bool:
    """End a process that belongs to a folder, and wait until it has ended; whether it did."""
    try:
        handle = os.pidfd_open(int(process.name))  # its number may become another's between two lines
    except OSError:
        return False
    try:
        if not _belongs(process, folder):
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], WAIT_S)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _belongs(process: Path, folder: Path) -> bool:
    """Whether a process carries the folder's name, or is one of Ray's that has a file in it open.

    Those give themselves titles, which they write over what was there first: their environment, as far as it takes.
    """
    if f"{MARK}={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
        return True
    if not (process / "cmdline").read_bytes().startswith(b"ray::"):
        return False
    return any(os.readlink(one).startswith(f"{folder}/") for one in (process / "fd").iterdir())


def _made() -> tuple[Path, int]:
    """A new folder, and what holds the lock on it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=short_place()))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():  # until it was locked it looked as if it had been left
                return folder, lock
            os.close(lock)


def short_place() -> Path:
    """Where Ray's sockets can lie: their whole path may have 107 bytes, of which Ray takes 64 below its folder."""
    usual = tempfile.gettempdir()
    longest = 107 - 64 - len(f"/{PREFIX}12345678")
    return Path("/tmp" if len(os.fsencode(usual)) > longest and os.access("/tmp", os.W_OK) else usual)
