"""Stores on each kind of storage."""

import os
import threading
import uuid

import pytest

from pipelines.storage import s3_client
from pipelines.storage.local import LocalStorage
from pipelines.storage.s3 import S3Storage
from pipelines.store import Store
from pipelines.tracking.mirror import ONCE, QUIET

os.environ.update({**QUIET, **ONCE})  # before anything imports MLflow


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
    s3_client.client().create_bucket(Bucket=name)
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


@pytest.fixture(scope="session")
def hasty_sqlite():
    """Databases that do not wait for the disk."""
    from sqlalchemy import Engine, event

    def hasten(connection, _):
        if type(connection).__module__.startswith("sqlite3"):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hasten)
    yield
    event.remove(Engine, "connect", hasten)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, hasty_sqlite):
    """An empty database of MLflow's, which takes seconds to make."""
    from pipelines.tracking import telling

    folder = tmp_path_factory.mktemp("prepared")
    (folder / "scratch").mkdir()
    telling.prepare(folder / "mlflow.db", folder / "mlflow", folder / "scratch")
    return folder / "mlflow.db"


@pytest.fixture
def told(store, prepared, request):
    """A store whose runs go to an MLflow that all tests share: opening a database takes a second."""
    from tests.pipelines.mlflow_told import Told

    # A server takes many seconds to come up: it begins early, where a test of the session needs one.
    if any("server_begun" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("server_begun")
    return Told(store, f"sqlite:///{prepared}", request.function.__name__)


@pytest.fixture
def own(tmp_path, prepared):
    """A store with an MLflow beside its artifacts."""
    from tests.pipelines.mlflow_told import Told, with_database

    return Told(with_database(tmp_path / "own", prepared), "own", "story")


@pytest.fixture(scope="session")
def server_begun(tmp_path_factory, prepared):
    """`lfm ui`, which comes up while tests go on that have no use for it."""
    from tests.pipelines.mlflow_told import Server

    server = Server(tmp_path_factory.mktemp("served"), prepared)
    yield server
    if server.process.poll() is None:
        server.process.terminate()
        server.process.wait(60)
