"""The process beside a run, and `lfm ui`."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.pool import Pool
from pipelines.__main__ import main
from pipelines.lineage import Event, history
from pipelines.tracking import mirror, outbox
from pipelines.tracking.mirror import Mirrored
from tests.pipelines.mlflow_told import ROOT, closed_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
]  # MLflow's own models use it


def processes_of(told):
    return [p for p in psutil.process_iter(["cmdline"]) if told.storage.uri in (p.info["cmdline"] or ())]


@pytest.fixture
def patient(monkeypatch):
    """A run that waits as long as it takes: no test is about how fast this machine is."""
    monkeypatch.setattr(mirror, "GRACE_S", 300.0)


def test_the_process_beside_a_run_tells_it_and_what_earlier_ones_left(own, patient, capfd):
    own.run("earlier").cached()
    own.enter("earlier")
    written = own.run()
    with Mirrored(own.storage, "r", "own") as mirrored:
        mirrored([Event("started"), Event("reuse", "a")])
        assert processes_of(own) == []
        mirrored([Event("start", "tuned")])
        mirrored([Event("start", "merged")])
        assert len(processes_of(own)) == 1
        written.whole()
        mirrored([Event("serving")])  # an endpoint stays up for days, the process does not
        assert processes_of(own) == []
    assert own.open() == {}
    assert capfd.readouterr() == ("", "")
    assert sorted(own.runs()) == ["earlier", "measured", "merged", "named", "passed", "r", "tuned"]


def test_a_server_that_is_down_costs_a_line_and_not_the_run(told, patient, capfd):
    where = f"http://127.0.0.1:{closed_port()}"
    with Mirrored(told.storage, "r", where) as mirrored:
        mirrored([Event("start", "tuned")])
        told.run().whole()
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"MLflow at {where} has not all of run r: ")
    assert "Connection refused" in said.err
    assert said.err.endswith("The next run, or lfm ui, goes on.\n")
    assert said.err.count("\n") == 1
    assert told.open()["r"].tracking == where


def test_what_takes_too_long_costs_a_line_and_not_the_run(told, monkeypatch, capfd):
    monkeypatch.setattr(mirror, "GRACE_S", 0.0)
    with Mirrored(told.storage, "r", told.where) as mirrored:
        mirrored([Event("start", "tuned")])
        told.run().whole()
    assert capfd.readouterr().err == (
        f"MLflow at {told.where} has not all of run r: it takes longer than the run could wait. "
        "The next run, or lfm ui, goes on.\n"
    )
    assert processes_of(told) == []
    assert list(told.open()) == ["r"]


def test_a_process_that_was_killed_costs_a_line_and_not_the_run(told, patient, capfd):
    with Mirrored(told.storage, "r", told.where) as mirrored:
        mirrored([Event("start", "tuned")])
        (process,) = processes_of(told)
        process.terminate()
        told.run().whole()
    assert capfd.readouterr().err.endswith(
        " has not all of run r: its process ended. The next run, or lfm ui, goes on.\n"
    )
    assert list(told.open()) == ["r"]


def test_the_process_dies_with_its_driver(told):
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipelines.lineage import Event\n"
        "from pipelines.storage.local import LocalStorage\nfrom pipelines.tracking.mirror import Mirrored\n"
        "mirrored = Mirrored(LocalStorage(Path(sys.argv[1])), 'r', 'own')\nmirrored([Event('start', 'a')])\n"
        "print(flush=True)\ninput()\n"
    )
    words = [sys.executable, "-c", code, told.storage.uri]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
        driver.stdout.readline()
        (process,) = [p for p in processes_of(told) if p.pid != driver.pid]
        driver.kill()
    assert not psutil.wait_procs([process], timeout=60)[1]


def test_a_switched_off_mirror_writes_nothing_and_starts_nothing(told):
    with Mirrored(told.storage, "r", "none") as mirrored:
        mirrored([Event("start", "tuned")])
        assert processes_of(told) == []
    assert told.open() == {}


@pytest.mark.ray
def test_lfm_run_mirrors_what_it_executes_and_a_stored_run_imports_no_mlflow(
    own, patient, project, one_ray, monkeypatch, capfd
):
    monkeypatch.setattr("pipelines.commands.run.opened", lambda *_: contextlib.nullcontext(Pool()))
    monkeypatch.chdir(project.folder)
    words = ["--store", own.storage.uri, "--mlflow", "own"]
    assert main(["run", "diamond.yaml", *words]) == 0
    assert own.open() == {}
    runs = {r["name"]: r for r in own.picture("diamond")["runs"]}
    (first,) = [n for n, r in runs.items() if r["below"] is None]
    assert {n: r["below"] for n, r in runs.items() if n != first} == dict.fromkeys("abcd", first)
    assert runs["b"]["params"]["size"] == "2"
    assert [(step, value) for step, _, value in runs["a"]["metrics"]["loss"]] == [(1, "0.5")]
    assert [d[0] for d in runs["d"]["datasets"]] == ["b", "c"]
    assert processes_of(own) == []

    again = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipelines", "run", "diamond.yaml", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in again.stderr.splitlines()}
    assert "pipelines" in imported
    assert not imported & {"mlflow", "ray"}
    (left,) = own.open()
    assert left in again.stdout
    assert [e.kind for e in history(own.storage, left)] == ["started", *["reuse"] * 4, "finished"]
    assert own.others() == []
    runs = own.picture("diamond")["runs"]
    assert [r["below"] for r in runs if r["name"] == left] == [None]
    assert left not in [r["below"] for r in runs]
    assert "MLflow" not in capfd.readouterr().err


@pytest.mark.parametrize("command", [["run", "diamond.yaml"], ["ui"]])
def test_a_place_that_mlflow_cannot_use_is_refused_before_anything_happens(project, monkeypatch, capsys, command):
    monkeypatch.chdir(project.folder)
    assert main([*command, "--mlflow", "mlruns"]) == 2
    assert "MLflow at 'mlruns': is no tracking server and no database" in capsys.readouterr().err
    assert not Path(".lfm/runs").exists()


@pytest.fixture
def server(server_begun):
    return server_begun.up()


@pytest.mark.slow
def test_ui_tells_what_is_open_and_prints_its_address(server, told):
    assert server.said == f"MLflow at {server.uri}; Ctrl-C ends it\n"
    assert outbox.entries(server.store.storage) == {}
    (run,) = told.picture("waiting", server.uri)["runs"]
    assert (run["name"], run["status"]) == ("waiting", "FINISHED")


@pytest.mark.slow
def test_ui_of_a_server_tells_it_what_is_open_and_says_where_it_is(server, told, capfd):
    told.run().whole()
    outbox.enter(told.storage, "r", server.uri)
    assert main(["ui", "--store", told.storage.uri, "--mlflow", server.uri]) == 0
    assert capfd.readouterr() == (f"MLflow at {server.uri}\n", "")
    assert told.open() == {}
    assert len(told.picture(where=server.uri)["runs"]) == 6


@pytest.mark.slow
def test_a_busy_port_is_a_sentence(server, capsys):
    assert main(["ui", "--store", server.store.storage.uri, "--mlflow", "own", "--port", str(server.port)]) == 2
    said = f"lfm ui: 127.0.0.1:{server.port} is in use, expected a free port. Give another one.\n"
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_ctrl_c_ends_the_pages_and_leaves_no_process(server):
    there = server.all()
    assert len(there) > 1
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    assert not psutil.wait_procs(there, timeout=30)[1]
    assert server.process.stderr.read() == ""
    assert not list(server.store.storage.scratches.iterdir())
    assert sorted(p.name for p in Path(server.store.storage.uri).parent.iterdir()) == ["store"]
