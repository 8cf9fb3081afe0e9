"""`lfm ui`: MLflow's own pages on the runs of a store."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from lfm.errors import LfmError
from operators.engines.ports import check_port
from pipelines.storage.base import remove
from pipelines.storage.opening import open_storage
from pipelines.tracking import outbox
from pipelines.tracking.mirror import QUIET

HOST = "127.0.0.1"
START_S = 120.0
STOP_S = 10.0
DIES_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG


class ServerFailed(LfmError, RuntimeError):
    """MLflow's server, which did not start."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said

    def __str__(self) -> str:
        return f"mlflow server: did not come up and said {self.said!r}, expected its pages. Look at its database."


def act(arguments: Namespace) -> int:
    """Tell MLflow what is open, then show its pages until Ctrl-C."""
    storage = open_storage(arguments.store)
    where = outbox.tracking(arguments.mlflow, storage)
    if where == outbox.NONE:
        raise outbox.NoTracking(where, "has no pages")
    uri = outbox.resolved(where, storage)
    served = uri.startswith("http")
    if not served:
        check_port("lfm ui", HOST, arguments.port)
    left = subprocess.run(
        [sys.executable, "-m", "pipelines.tracking.mirror", storage.uri, where], stderr=subprocess.PIPE, check=False
    )
    if left.returncode:
        last = left.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        print(f"MLflow has not all runs of the store yet. {last}".rstrip(), file=sys.stderr)
    if served:
        print(f"MLflow at {uri}")
        return 0
    words = ["--backend-store-uri", uri, "--host", HOST, "--port", str(arguments.port), "--workers", "1"]
    words += ["--no-serve-artifacts"]
    words += ["--default-artifact-root", outbox.files(storage).as_uri()] if where == outbox.OWN else []
    scratch = storage.scratch()
    try:
        with _server(words, scratch / "server.log") as process:
            _answers(process, arguments.port, scratch / "server.log")
            print(f"MLflow at http://{HOST}:{arguments.port}; Ctrl-C ends it", flush=True)
            process.wait()
            raise ServerFailed(_last_line(scratch / "server.log"))
    except KeyboardInterrupt:
        return 0
    finally:
        remove(scratch)


@contextlib.contextmanager
def _server(words: list[str], log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """MLflow's server and its workers, which end with the block and with this process."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words],
            env={**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):  # nobody of its group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGTERM)


def _answers(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Wait until the pages are there."""
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
            return
        time.sleep(0.1)
    raise ServerFailed(_last_line(log))


def _last_line(log: Path) -> str:
    return log.read_text(errors="replace").strip().rpartition("\n")[2]
