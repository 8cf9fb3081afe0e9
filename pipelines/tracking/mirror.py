"""Journal -> MLflow, beside the run: a process that follows what the driver writes, and whose absence harms nothing."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from pipelines.lineage import Event
from pipelines.storage.base import Storage
from pipelines.storage.opening import open_storage
from pipelines.tracking import outbox

GRACE_S = 10.0  # what a run waits for at its end; what takes longer stays in the outbox
LATE_S = 2.0  # what its process has then to say so
LATE = "it takes longer than the run could wait"

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
# MLflow's client would repeat a request whose answer was lost, and what that had created would be there twice. Here a
# failure is one at once, and the next delivery looks before it creates.
ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


class Mirrored:
    """A run that MLflow is told of, as its driver sees it: called with the run's events, it starts the process.

    Whatever becomes of that process, the run goes on, and ends at most `GRACE_S` later.
    """

    def __init__(self, storage: Storage, run: str, where: str) -> None:
        self.storage, self.run, self.where = storage, run, where
        self._wanted = where != outbox.NONE
        self._process: subprocess.Popen[bytes] | None = None
        self._noise: Any = None

    def __enter__(self) -> "Mirrored":
        if self._wanted:
            outbox.enter(self.storage, self.run, self.where)
        return self

    def __call__(self, events: Sequence[Event]) -> None:
        """Hear of events: the first step that starts starts the process, an endpoint that is up ends it."""
        if self._wanted and any(e.kind == "start" for e in events):
            self._start()
        if any(e.kind == "serving" for e in events):
            self._end()

    def __exit__(self, *ended: object) -> None:
        self._end()

    def _start(self) -> None:
        self._wanted = False
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115  `_end` closes it
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.tracking.mirror", self.storage.uri, self.where, self.run],
                stdin=subprocess.PIPE,  # closed when this process dies, and then that one does
                stdout=subprocess.PIPE,
                stderr=self._noise,
                start_new_session=True,  # Ctrl-C is for the driver
            )
        except OSError as error:
            self._say(str(error))

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with process, self._noise:
            try:
                said, _ = process.communicate(f"{GRACE_S}\n".encode(), timeout=GRACE_S + LATE_S)
            except subprocess.TimeoutExpired:
                self._say(LATE)
            else:
                if process.returncode:
                    self._noise.seek(0)
                    lines = (said or self._noise.read() or b"its process ended").decode(errors="replace").strip()
                    self._say(lines.rpartition("\n")[2])
            finally:
                process.kill()

    def _say(self, why: str) -> None:
        at = outbox.resolved(self.where, self.storage)
        why = why.rstrip(".")
        sys.stderr.write(f"MLflow at {at} has not all of run {self.run}: {why}. The next run, or lfm ui, goes on.\n")


def main(arguments: Sequence[str]) -> int:
    """The process: ``STORE WHERE RUN`` follows a run until its driver has ended, ``STORE WHERE`` tells what is open."""
    os.environ.update({**QUIET, **os.environ, **ONCE})
    storage, where = open_storage(arguments[0]), arguments[1]
    if len(arguments) == 2:
        from pipelines.tracking.delivery import Delivery

        delivery = Delivery(storage)
        if where == outbox.OWN:
            delivery.prepare()
        failed = delivery.others()
        sys.stdout.writelines(f"{clause}\n" for clause in failed)
        return int(bool(failed))
    os.nice(19)
    ended, told = threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(ended, told), daemon=True).start()
    from pipelines.tracking.delivery import Delivery, reason
    from pipelines.tracking.telling import FAILURES

    delivery = Delivery(storage)
    try:
        delivery.follow(arguments[2], where, ended)
    except FAILURES as error:
        sys.stdout.write(f"{reason(error)}\n")
        return 1
    told.set()
    delivery.others()
    return 0


def _listen(ended: threading.Event, told: threading.Event) -> None:
    """Hear on standard input for how long the driver will wait now, or that it died: neither is outlived."""
    line = os.read(sys.stdin.fileno(), 64)  # `sys.stdin` would be locked when the process ends meanwhile
    if line:
        ended.set()
        time.sleep(float(line))
        if not told.is_set():
            sys.stdout.write(f"{LATE}\n")
            sys.stdout.flush()
    os._exit(0 if told.is_set() else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
