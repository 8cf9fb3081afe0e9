"""Stores on each kind of storage."""

import threading
import uuid

import pytest

from pipelines import s3
from pipelines.local_storage import LocalStorage
from pipelines.s3_storage import S3Storage
from pipelines.store import Store


class OneAtATime:
    """An application that answers one request after the other: moto looks and writes in two steps, S3 in one."""

    def __init__(self, application):
        self.application, self.lock = application, threading.Lock()

    def __call__(self, environment, start_response):
        with self.lock:
            return self.application(environment, start_response)


@pytest.fixture(scope="session")
def moto_server(s3_environment):
    """An S3 on loopback, where `s3_environment` says that there is one."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *said):
            pass

    s3_environment.listen()
    server = make_server(
        *s3_environment.getsockname(),
        OneAtATime(DomainDispatcherApplication(create_backend_app)),
        threaded=True,
        request_handler=Quiet,
        fd=s3_environment.fileno(),
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def bucket(moto_server, tmp_path, monkeypatch):
    """A new bucket, and a machine that has fetched nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = f"b-{uuid.uuid4().hex}"
    s3.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def s3_store(bucket):
    return Store(S3Storage(f"s3://{bucket}/some/where"))


@pytest.fixture(params=["local", "s3"])
def either_store(request, tmp_path):
    """The same for every kind of storage."""
    if request.param == "s3":
        return request.getfixturevalue("s3_store")
    return Store(LocalStorage(tmp_path / "store"))
