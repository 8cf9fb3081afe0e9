"""A store that MLflow is told of, and all that MLflow then holds of it."""

import json
import os
import shutil
import socket
import subprocess
import sys

import psutil

from pipelines.__main__ import ROOT
from pipelines.storage.local import LocalStorage
from pipelines.store import Store
from pipelines.tracking import outbox, telling
from pipelines.tracking.delivery import Delivery
from tests.pipelines.journals import Written


def with_database(folder, prepared):
    store = Store(LocalStorage(folder))
    shutil.copy(prepared, outbox.database(store.storage))
    return store


class Told:
    """A store of a test's own, and a place in an MLflow where its pipeline is the only one of its name."""

    def __init__(self, store, where, pipeline):
        self.store, self.storage, self.where, self.pipeline = store, store.storage, where, pipeline

    def run(self, name="r", pipeline=None):
        return Written(self.store, name, pipeline or self.pipeline)

    def small(self, name, pipeline):
        """A run that has it all in one step, which takes data, makes a model, measures and registers; it is entered."""
        run = self.run(name, pipeline)
        run.begin("named", inputs={"model": "base", "data": "text"})
        run.start("named")
        run.measure("named", 1, 3.0, 2.0)
        run.commit("named")
        run.end()
        self.enter(name)
        return run

    def shape(self, run, where=None):
        """What MLflow holds of a `small` run, without its own names."""
        text = json.dumps(self.picture(run.pipeline, where), sort_keys=True)
        names = {self.storage.uri: "store", run.made["named"]: "digest", run.pipeline: "small", run.name: "run"}
        for one, other in names.items():
            text = text.replace(one, other)
        return text

    def enter(self, *runs):
        for run in runs:
            outbox.enter(self.storage, run, self.where)

    def deliver(self, run="r", where=None):
        outbox.enter(self.storage, run, where or self.where)
        return Delivery(self.storage).deliver(run, self.open()[run])

    def open(self):
        return outbox.entries(self.storage)

    def others(self):
        return Delivery(self.storage).others()

    def client(self, where=None):
        uri = outbox.resolved(where or self.where, self.storage)
        return telling.MlflowClient(tracking_uri=uri, registry_uri=uri)

    def picture(self, pipeline=None, where=None):
        return picture(self.client(where), pipeline or self.pipeline)

    def runs(self):
        return {r["name"]: r for r in self.picture()["runs"]}


def picture(client, pipeline):
    """Everything that MLflow holds of a pipeline, without the names that MLflow itself gave."""
    experiment = client.get_experiment_by_name(pipeline).experiment_id
    runs = [client.get_run(r.info.run_id) for r in client.search_runs([experiment])]
    names = {r.info.run_id: r.info.run_name for r in runs}
    models = {m.model_id: m for m in client.search_logged_models([experiment])}
    digest = {i: m.tags["lfm.digest"] for i, m in models.items()}

    def shown(run):
        histories = {k: client.get_metric_history(run.info.run_id, k) for k in run.data.metrics}
        tags = {k: v for k, v in run.data.tags.items() if k.startswith("lfm.")}
        return {
            "name": run.info.run_name,
            "below": names.get(run.data.tags.get("mlflow.parentRunId")),
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time),
            "tags": tags,
            "params": run.data.params,
            "metrics": {k: sorted((m.step, m.timestamp, str(m.value)) for m in h) for k, h in histories.items()},
            "datasets": sorted(
                (d.dataset.name, d.dataset.digest, d.dataset.source_type, d.dataset.source,
                 *sorted((t.key, t.value) for t in d.tags)) for d in run.inputs.dataset_inputs
            ),
            "takes": sorted(digest[m.model_id] for m in run.inputs.model_inputs),
            "makes": sorted(digest[m.model_id] for m in run.outputs.model_outputs),
        }  # fmt: skip

    registered = f"name = '{pipeline}-helper'"

    def version(one):
        model = digest[one.source.removeprefix("models:/")] if one.source.startswith("models:/") else one.source
        return int(one.version), model, names.get(one.run_id), sorted(one.tags.items())

    return {
        "runs": sorted((shown(r) for r in runs), key=lambda r: (r["tags"]["lfm.run"], r["name"])),
        "models": sorted(
            (m.name, m.model_type, m.status.value, names.get(m.source_run_id, ""),
             sorted((k, v) for k, v in m.tags.items() if k != "mlflow.modelVersions"),  # a server's, not a database's
             sorted(m.params.items()), sorted((x.key, x.value) for x in m.metrics or ())) for m in models.values()
        ),
        "registered": [
            (r.name, {a: int(v) for a, v in r.aliases.items()}) for r in client.search_registered_models(registered)
        ],
        "versions": sorted(version(v) for v in client.search_model_versions(registered)),
    }  # fmt: skip


def closed_port():
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`lfm ui` on a store with one run that MLflow has not heard of yet."""

    def __init__(self, folder, prepared):
        self.store = with_database(folder / "store", prepared)
        Written(self.store, "waiting", "waiting").cached()
        outbox.enter(self.store.storage, "waiting", "own")
        self.port = closed_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.begin()

    def begin(self):
        words = [sys.executable, "-m", "pipelines", "ui", "--store", self.store.storage.uri, "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("MLFLOW_TRACKING_URI", None)
        self.process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said = ""

    def up(self):
        """Itself once it has said where its pages are; begun again where a test has ended it."""
        if self.process.poll() is not None:
            self.begin()
        if not self.said:
            self.said = self.process.stdout.readline()
            assert self.said, self.process.stderr.read()
        return self

    def all(self):
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]
