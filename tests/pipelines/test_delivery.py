"""What MLflow holds after any number of deliveries, crashes and outages; in a database and on a server."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from cluster import processes
from pipelines.storage.local import LocalStorage
from pipelines.store import Store
from pipelines.tracking import delivery, outbox, telling
from pipelines.tracking.delivery import Delivery
from pipelines.tracking.outbox import Entry
from tests.pipelines.journals import BASE, BEGAN, TEXT, claim_as
from tests.pipelines.mlflow_told import Told

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
]  # MLflow's own models use it


def test_a_run_is_a_parent_with_a_child_for_every_executed_step(told):
    written = told.run().whole()
    told.deliver()
    runs = told.runs()
    assert sorted(runs) == ["measured", "merged", "named", "passed", "r", "tuned"]
    assert runs["r"]["below"] is None
    assert {r["below"] for n, r in runs.items() if n != "r"} == {"r"}
    assert {r["status"] for r in runs.values()} == {"FINISHED"}
    assert runs["r"]["times"] == ((BEGAN + 1) * 1000, (BEGAN + 15) * 1000)
    tuned = runs["tuned"]
    assert tuned["params"] == {
        "operator": "tune", "method": "lora", "method.rank": "4", "max_steps": "2", "schedule": '["warm", 0.5]',
        "note": "as it is", "resources.workers": "1", "resources.accelerator": "cpu",
    }  # fmt: skip
    assert tuned["tags"] == {
        "lfm.run": "r", "lfm.step": "tuned", "lfm.operator": "tune", "lfm.kind": "adapter", "lfm.attempts": "2",
        "lfm.fingerprint": "f-tune", "lfm.digest": written.made["tuned"],
    }  # fmt: skip
    loss = [(step, value) for step, _, value in tuned["metrics"]["loss"]]
    assert sorted(loss) == [(1, "2.5"), (1, "3.0"), (2, "2.5"), (2, "nan")]
    assert (1, int((BEGAN + 3.01) * 1000), "3.0") in tuned["metrics"]["loss"]
    measured = {k: h[0][2] for k, h in runs["measured"]["metrics"].items()}
    assert measured == {"sets/chat/documents": "3.0", "sets/chat/loss": "1.5", "sets/chat/perplexity": "4.5"}
    assert not told.open()


def test_a_trial_is_a_run_below_the_one_that_searches_with_steps_of_its_own(told):
    told.run().whole()
    told.run("r~found~1").trial("r", **{"merged.density": 0.25})
    told.deliver()
    for _ in range(2):  # the second time nothing is there twice
        told.deliver("r~found~1")
    runs = [r for r in told.picture()["runs"] if r["tags"]["lfm.run"] == "r~found~1"]
    assert [(r["name"], r["below"]) for r in runs] == [("measured", "r~found~1"), ("r~found~1", "r")]
    trial = runs[1]
    assert (trial["params"], trial["tags"]["lfm.trial_of"]) == ({"merged.density": "0.25"}, "r")
    assert [value for _, _, value in trial["metrics"]["sets/chat/loss"]] == ["1.5"]


def test_datasets_and_models_carry_our_digests(told):
    made = told.run().whole().made
    told.deliver()
    seen = told.picture()
    runs = told.runs()
    assert runs["tuned"]["takes"] == [BASE["digest"]]
    assert runs["tuned"]["makes"] == [made["tuned"]]
    assert runs["merged"]["takes"] == sorted([BASE["digest"], made["tuned"]])
    assert runs["merged"]["makes"] == runs["passed"]["makes"] == runs["named"]["makes"] == [made["merged"]]
    assert runs["measured"]["makes"] == []
    assert runs["measured"]["datasets"] == sorted([
        ("prepared", made["prepared"][:36], "local",
         json.dumps({"uri": f"{told.storage.uri}/artifacts/{made['prepared']}"}),
         ("lfm.digest", made["prepared"]), ("mlflow.data.context", "data")),
        ("text", TEXT["digest"][:36], "local", json.dumps({"uri": "/data/text.txt"}),
         ("lfm.digest", TEXT["digest"]), ("mlflow.data.context", "data")),
    ])  # fmt: skip
    models = {m[0]: m for m in seen["models"]}
    assert {n: m[1:4] for n, m in models.items()} == {
        "base": ("model", "READY", ""),
        "tuned": ("adapter", "READY", "tuned"),
        "merged": ("model", "READY", "merged"),
    }
    assert dict(models["merged"][4])["lfm.uri"] == f"{told.storage.uri}/artifacts/{made['merged']}"
    assert dict(models["base"][4])["lfm.uri"] == BASE["uri"]
    assert dict(models["merged"][5])["method.density"] == "0.5"
    assert ("sets/chat/loss", 1.5) in models["merged"][6]


def test_mlflow_itself_opens_a_dataset_that_it_was_told_of(told):
    import mlflow

    told.run().whole()
    told.deliver()
    experiment = told.client().get_experiment_by_name(told.pipeline).experiment_id
    (run,) = told.client().search_runs([experiment], "tags.`lfm.step` = 'tuned'")
    source = mlflow.data.get_source(run.inputs.dataset_inputs[0])
    assert (Path(source.load()) / "config.json").is_file()


def test_the_registry_is_mirrored_whole_with_its_aliases(told):
    one, two = told.run("one").whole(), told.run("two").whole()
    again = told.run("three")
    again.made["named"] = again.made["passed"] = one.made["merged"]
    again.begin("passed", "named", "merged")
    again.reuse("passed")
    again.start("named")
    again.commit("named")
    again.end()
    for run in ("two", "one", "three"):  # the second first: its version is the second all the same
        told.deliver(run)
    seen = told.picture()
    assert seen["registered"] == [(one.registered, {"champion": 1})]
    assert [v[:2] for v in seen["versions"]] == [(1, one.made["merged"]), (2, two.made["merged"])]
    assert dict(seen["versions"][0][3]) == {
        "lfm.version": "1", "lfm.digest": one.made["merged"], "lfm.run": "one", "lfm.step": "named",
    }  # fmt: skip


def test_versions_that_somebody_else_registered_stay_and_ours_come_after_them(told):
    written = told.run().whole()
    told.client().create_registered_model(written.registered)
    told.client().create_model_version(written.registered, "s3://somewhere/else", await_creation_for=0)
    told.deliver()
    found = told.client().get_model_version_by_alias(written.registered, "champion")
    assert (int(found.version), found.tags["lfm.digest"]) == (2, written.made["merged"])


def test_another_store_s_runs_and_versions_of_the_same_name_stay_apart(told, tmp_path):
    """A server is shared by people who call things alike."""
    other = Told(Store(LocalStorage(tmp_path / "other")), told.where, told.pipeline)
    ours, theirs = told.run(), other.run()
    theirs.made["named"] = theirs.made["passed"] = theirs.made["tuned"]
    theirs.clock += 1
    ours.whole(), theirs.whole()
    for _ in range(2):
        told.deliver()
        other.deliver()
    seen = told.picture()
    assert [r["name"] for r in seen["runs"]].count("r") == 2
    assert len(seen["runs"]) == 12
    assert [v[:2] for v in seen["versions"]] == [(1, ours.made["merged"]), (2, theirs.made["tuned"])]
    assert seen["registered"] == [(ours.registered, {"champion": 2})]


def test_delivering_again_changes_nothing(told):
    told.run().whole()
    told.deliver()
    once = told.picture()
    for _ in range(2):
        told.deliver()
        assert told.picture() == once


def test_following_a_run_ends_where_delivering_it_whole_ends(told):
    """One `Delivery` sees the run grow, as the process beside it does."""
    grown = told.run()
    delivering = Delivery(told.storage)

    def see():
        told.enter("r")
        delivering.deliver("r", Entry(told.where))
        return told.runs()

    grown.begin()
    assert list(see()) == ["r"]
    grown.reuse("prepared")
    grown.start("tuned")
    grown.measure("tuned", 1, 3.0)
    assert len(see()["tuned"]["metrics"]["loss"]) == 1
    grown.measure("tuned", 1, 2.0, 1.0)
    assert len(see()["tuned"]["metrics"]["loss"]) == 3
    grown.fail("tuned", 1)
    assert see()["tuned"]["status"] == "FAILED"
    grown.start("tuned", 2)
    grown.measure("tuned", 2, 1.5)
    grown.commit("tuned", 2)
    assert see()["tuned"]["status"] == "FINISHED"
    for step in ("merged", "measured", "passed", "named"):
        grown.start(step)
        grown.commit(step)
    grown.end()
    see()
    followed = told.picture()
    told.deliver()
    assert told.picture() == followed
    assert {r["status"] for r in followed["runs"]} == {"FINISHED"}
    assert len(followed["runs"]) == 6


def test_a_store_in_a_bucket_is_told_of_like_any_other(told, s3_store):
    bucket = Told(s3_store, told.where, told.pipeline)
    made = bucket.run().whole().made
    bucket.deliver()
    runs = bucket.runs()
    assert len(runs) == 6
    (dataset,) = runs["tuned"]["datasets"]
    assert dataset[2:4] == ("s3", json.dumps({"uri": f"{s3_store.storage.uri}/artifacts/{made['prepared']}"}))
    assert bucket.open() == {}


class Flaky:
    """An MLflow client whose connection breaks after one call, the answer to which never arrives."""

    def __init__(self, client, breaks_after):
        self.client, self.left, self.calls = client, breaks_after, []

    def __getattr__(self, name):
        real = getattr(self.client, name)

        def call(*words, **named):
            answer = real(*words, **named)
            self.calls.append(name)
            self.left -= 1
            if self.left == 0:
                raise ConnectionError("the connection broke")
            return answer

        return call


@pytest.mark.slow
def test_a_crash_after_any_call_leaves_nothing_twice(told, monkeypatch):
    """Each time under other names."""
    real, made = telling.MlflowClient, []

    def breaking(after):
        def client(**named):
            made.append(Flaky(real(**named), after))
            return made[-1]

        monkeypatch.setattr(telling, "MlflowClient", client)

    def small(number):
        return told.small(f"r{number:03}", f"{told.pipeline}-{number:03}")

    breaking(0)
    run = small(0)
    assert told.others() == []
    (undisturbed,) = made
    wanted = told.shape(run)
    assert len(json.loads(wanted)["runs"]) == 2
    assert {"create_run", "log_inputs", "log_outputs", "create_logged_model", "create_model_version"} < {
        *undisturbed.calls
    }
    for number, call in enumerate(undisturbed.calls, 1):
        breaking(number)
        run = small(number)
        assert told.others() == [f"MLflow at {told.where} has not all of run {run.name}: the connection broke"]
        assert list(told.open()) == [run.name]
        monkeypatch.setattr(telling, "MlflowClient", real)
        assert (told.others(), told.open()) == ([], {})
        assert told.shape(run) == wanted, call


def test_an_outage_leaves_the_entry_and_says_so_in_a_clause(told, monkeypatch):
    told.run("one").whole()
    told.run("two").cached()
    told.enter("one", "two")
    real = telling.MlflowClient
    monkeypatch.setattr(telling, "MlflowClient", lambda **named: Flaky(real(**named), 1))
    said = "MLflow at {} has not all of run {}: the connection broke"
    assert told.others() == [said.format(told.where, r) for r in ("one", "two")]
    assert list(told.open()) == ["one", "two"]
    monkeypatch.setattr(telling, "MlflowClient", real)
    assert told.others() == []
    assert told.open() == {}
    assert told.runs()["two"]["status"] == "FINISHED"
    assert not [r for r in told.runs().values() if r["below"] == "two"]


def test_a_run_that_broke_off_is_told_once_and_again_when_it_was_resumed(told, monkeypatch):
    written = told.run()
    written.begin("prepared", "tuned")
    written.reuse("prepared")
    written.start("tuned")
    told.enter("r")
    told.others()
    assert told.open()["r"].told == (1, 3)
    assert told.runs()["tuned"]["status"] == "KILLED"

    monkeypatch.setattr(delivery, "Tracking", None)  # a second time nobody asks MLflow
    assert told.others() == []
    monkeypatch.undo()

    written = told.run()
    written.begin("prepared", "tuned")
    written.reuse("prepared")
    written.start("tuned", 2)
    written.commit("tuned", 2)
    written.end()
    assert told.others() == []
    runs = told.runs()
    assert (runs["tuned"]["status"], runs["r"]["status"], len(runs)) == ("FINISHED", "FINISHED", 2)
    assert runs["tuned"]["tags"]["lfm.attempts"] == "2"
    assert told.open() == {}


def test_a_run_whose_driver_was_killed_while_it_was_told_is_told_of_that(told, monkeypatch):
    """No event says so: the journal and the number of claims are those that MLflow knew when the driver lived."""
    written = told.run()
    written.begin("tuned", inputs={"model": "base"})
    written.start("tuned")
    with monkeypatch.context() as lives:
        lives.setattr("pipelines.lineage.lives", lambda storage, run: True)
        told.deliver()
        assert {r["status"] for r in told.runs().values()} == {"RUNNING"}
    written.measure("tuned", 1, 3.0)
    assert told.others() == []
    runs = told.runs()
    assert {r["status"] for r in runs.values()} == {"KILLED"}
    assert [value for _, _, value in runs["tuned"]["metrics"]["loss"]] == ["3.0"]
    assert list(told.open()) == ["r"]


def test_a_resume_during_the_last_delivery_keeps_its_entry(told, monkeypatch):
    told.run().cached()
    real = outbox.close

    def resumed(storage, run):
        told.run().begin("prepared")
        told.enter("r")
        real(storage, run)

    monkeypatch.setattr(outbox, "close", resumed)
    told.deliver()
    assert list(told.open()) == ["r"]


def test_a_run_that_another_process_drives_is_left_to_it(told):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        born = psutil.Process(other.pid).create_time()
        claim_as(told.store, "r", {"host": processes.host(), "pid": other.pid, "born": born})
        told.enter("r")
        assert told.others() == []
        assert list(told.open()) == ["r"]
        other.communicate(b"\n")
    assert told.others() == []  # it wrote nothing, so there is nothing to tell
    assert told.open() == {}


def test_two_deliveries_at_once_tell_everything_once(told):
    told.run().whole()
    told.enter("r")

    def others():
        while told.open():
            told.others()

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    once = told.picture()
    assert len(once["runs"]) == 6
    told.deliver()
    assert told.picture() == once


def test_a_database_is_made_whole_by_whoever_is_first(tmp_path, prepared, monkeypatch):
    """A second one that was made meanwhile is thrown away."""
    from mlflow.store.tracking import sqlalchemy_store

    made = []

    class Instant:
        def __init__(self, uri, root):
            made.append(uri)
            shutil.copy(prepared, uri.removeprefix("sqlite:///"))
            shutil.copy(prepared, tmp_path / "mlflow.db")
            self.engine = self

        def dispose(self):
            pass

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", Instant)
    (tmp_path / "scratch").mkdir()
    for _ in range(2):
        telling.prepare(tmp_path / "mlflow.db", tmp_path / "mlflow", tmp_path / "scratch")
    assert made == [f"sqlite:///{tmp_path / 'scratch' / 'mlflow.db'}"]


@pytest.mark.slow
def test_a_server_holds_what_a_database_holds(told, server_begun):
    server = server_begun.up()
    told.run().whole()
    told.deliver()
    held = told.picture()
    for _ in range(2):
        told.deliver("r", server.uri)
        seen = told.picture(where=server.uri)
        for part in held:
            assert seen[part] == held[part]
    assert told.open() == {}
