"""MLflow down, answers that get lost, processes that are killed while they tell: in the end all of it is there once."""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.pool import Pool
from pipelines.__main__ import ROOT, main
from pipelines.faults import DELIVERY_POINTS
from pipelines.lineage import runs
from pipelines.tracking import mirror
from tests.pipelines.mlflow_told import closed_port

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]


class Teller:
    """What starts processes that tell MLflow, and the file that says where the next one dies."""

    def __init__(self, folder, uri):
        self.fault = folder / "fault"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LFM_FAULTS": str(self.fault)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.tellers", uri],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def tell(self, store):
        """Tell MLflow of all that is open, and return the exit code."""
        self.process.stdin.write(f"{store.storage.uri}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def teller(tmp_path_factory, prepared):
    made = Teller(tmp_path_factory.mktemp("tellers"), f"sqlite:///{prepared}")
    yield made
    made.process.stdin.close()
    made.process.wait(60)


@pytest.fixture(scope="module")
def undisturbed():
    """What MLflow holds of a small run that nothing happens to, once it was told."""
    return {}


@pytest.mark.parametrize("point", DELIVERY_POINTS)
def test_a_process_that_is_killed_while_it_tells_leaves_nothing_twice(point, told, teller, undisturbed):
    if not undisturbed:
        run = told.small("calm", "nothing-happens")
        assert teller.tell(told.store) == 0
        undisturbed["shape"] = told.shape(run)
    run = told.small("killed", re.sub(r"\W+", "-", point))
    teller.fault.write_text(point)
    assert teller.tell(told.store) == -signal.SIGKILL
    assert not teller.fault.exists(), f"nobody got to {point!r}"
    assert list(told.open()) == ([] if point == "tell: entry is gone" else ["killed"])
    told.enter("killed")  # as its resume would
    assert told.others() == []
    assert told.open() == {}
    assert told.shape(run) == undisturbed["shape"]


class Door:
    """An address in front of MLflow's server: closed until it is opened, and then an answer may get lost in it."""

    def __init__(self, server):
        self.server, self.lost = server, ""
        self.port = closed_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.listener = None

    def open(self):
        door = self

        class Through(BaseHTTPRequestHandler):
            def through(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", door.server.port)) as inside:
                    inside.request(self.command, self.path, body, dict(self.headers))
                    answer = inside.getresponse()
                    data = answer.read()
                if self.command == "POST" and self.path == door.lost:
                    door.lost = ""
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers["Content-Type"])
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = through  # noqa: N815

            def log_message(self, *said):
                pass

        self.listener = ThreadingHTTPServer(("127.0.0.1", self.port), Through)
        threading.Thread(target=self.listener.serve_forever, args=(0.01,)).start()

    def close(self):
        if self.listener is not None:
            self.listener.shutdown()
            self.listener.server_close()


@pytest.fixture
def door(server_begun):
    made = Door(server_begun.up())
    yield made
    made.close()


API = "/api/2.0/mlflow"


@pytest.mark.parametrize(
    "lost", ["experiments/create", "runs/create", "logged-models", "registered-models/create", "model-versions/create"]
)
def test_an_answer_that_was_lost_is_not_asked_for_by_creating_again(lost, told, door):
    door.open()
    told.where = door.uri
    run = told.small("r", f"lost-{lost.replace('/', '-')}")
    door.lost = f"{API}/{lost}"
    (said,) = told.others()
    assert said.startswith(f"MLflow at {door.uri} has not all of run r: ")
    assert door.lost == ""
    assert told.others() == []
    assert told.open() == {}
    seen = told.picture(run.pipeline)
    assert [r["name"] for r in seen["runs"]] == ["named", "r"]
    assert [v[:2] for v in seen["versions"]] == [(1, run.made["named"])]
    assert [m[0] for m in seen["models"]] == ["base", "named"]


MAKES = """
from operators.artifact import Model
from operators.base import operator
from operators.workspace import Workspace


@operator()
def made(work: Workspace, *, size: int) -> Model:
    work.progress(1, 1, loss=0.5)
    (work.scratch / "m").mkdir()
    (work.scratch / "m" / "config.json").write_text(str(size))
    return work.save(Model, work.scratch / "m")
"""
PIPELINE = """
name: outage
uses: [makes.py]
steps:
  model: {operator: made, params: {size: 1}}
  other: {operator: made, params: {size: 2}}
  named: {operator: register, inputs: {model: model}, params: {name: outage-helper}}
"""


@pytest.mark.ray
def test_runs_without_their_mlflow_succeed_and_are_told_once_when_it_is_back(
    door, told, one_ray, tmp_path, monkeypatch, capfd
):
    """The first is killed and resumed, the second tells of both."""
    import ray

    (tmp_path / "makes.py").write_text(MAKES)
    (tmp_path / "outage.yaml").write_text(PIPELINE)
    fault = tmp_path / "fault"
    fault.write_text("journal: after commit")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LFM_FAULTS": str(fault)}
    common = ["--store", told.storage.uri, "--mlflow", door.uri]

    def lfm(*words):
        there = ["--address", ray.get_runtime_context().gcs_address]
        command = [sys.executable, "-m", "pipelines", *words, *common, *there]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert lfm("run", "outage.yaml").returncode == -signal.SIGKILL
    resumed = lfm("resume", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert re.fullmatch(rf"MLflow at {door.uri} has not all of run .*\n", resumed.stderr)
    (first,) = told.open()

    door.open()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mirror, "GRACE_S", 60.0)
    monkeypatch.setattr("pipelines.commands.run.opened", lambda *_: contextlib.nullcontext(Pool()))
    assert main(["run", "outage.yaml", "--set", "other.size=3", *common]) == 0
    assert "MLflow" not in capfd.readouterr().err
    assert told.open() == {}
    (second,) = {*runs(told.storage)} - {first}
    seen = told.picture("outage", door.uri)
    assert sorted((r["below"] or "", r["name"]) for r in seen["runs"]) == sorted(
        [
            *[("", first), (first, "model"), (first, "other"), (first, "named")],
            *[("", second), (second, "other"), (second, "named")],  # naming is an effect, which no cache holds
        ]
    )
    assert {r["status"] for r in seen["runs"]} == {"FINISHED"}
    assert [v[0] for v in seen["versions"]] == [1]
    assert seen["registered"] == [("outage-helper", {"champion": 1})]

    told.deliver(first, door.uri)
    told.deliver(second, door.uri)
    assert told.picture("outage", door.uri) == seen
