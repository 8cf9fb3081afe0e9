"""A head with a dashboard, as a cluster has it that somebody else started: nothing of it is this process's."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.home import MARK, end

WAIT_S = 300  # a machine that is busy takes minutes to start Ray


@dataclass(frozen=True)
class Started:
    """Where it answers, and the file with its token."""

    dashboard: str
    token: Path


@contextmanager
def head(tmp_path: Path) -> Iterator[Started]:
    """Start one, and end what carries its name."""
    folder = Path(tempfile.mkdtemp(prefix="lfm-head-", dir="/tmp"))  # sockets need a short path
    token = tmp_path / "token"
    token.write_text("5" * 64)
    beside = Path(sys.executable).parent
    environment = {
        **os.environ,
        MARK: str(folder),
        "PATH": f"{beside}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": str(WAIT_S),
    }
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        environment.pop(name, None)
    port, shown, *others = free_ports(4)
    words = ["--head", "--block", f"--port={port}", f"--dashboard-port={shown}", "--dashboard-host=127.0.0.1",
             "--include-dashboard=true", f"--temp-dir={folder}", "--num-cpus=2", "--labels=ray.io/node-group=head",
             f"--ray-client-server-port={others[0]}", f"--dashboard-agent-listen-port={others[1]}"]  # fmt: skip
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [beside / "ray", "start", *words], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait(f"http://127.0.0.1:{shown}", process, tmp_path / "head.log")
        yield Started(f"http://127.0.0.1:{shown}", token)
    finally:
        end(folder)
        process.wait(60)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the dashboard answers, if only that it wants a token."""
    until = time.monotonic() + WAIT_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
