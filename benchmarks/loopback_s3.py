"""An S3 on loopback, in a process of its own, and what it is asked for."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

from pipelines.storage import s3_client

UP_S = 60


@contextlib.contextmanager
def loopback() -> Iterator[tuple[str, Counter[str]]]:
    """A new bucket, and how often it was asked for each verb since."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (
        mock.patch.dict(os.environ, environment),
        subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as server,
    ):
        try:
            _wait(port)
            name = f"b-{uuid.uuid4().hex}"
            s3_client.client().create_bucket(Bucket=name)
            yield name, _counted()
        finally:
            server.terminate()


def _counted() -> Counter[str]:
    found: Counter[str] = Counter()

    def count(model: Any, **more: Any) -> None:
        found[model.name] += 1

    for client in (s3_client.client(), s3_client.client(retries=1)):
        client.meta.events.register("before-call.s3", count)
    return found


def _wait(port: int) -> None:
    until = time.monotonic() + UP_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
