"""Experiment -> MLflow: whatever of it MLflow does not hold yet, and nothing twice.

MLflow names what it creates itself, so everything is looked up by our tags before it is created. Only the process
whose turn it is (`outbox.turn`) may tell; it may die at any moment, and the next one goes on from what MLflow holds.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset as MlflowDataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipelines.experiment import MODELS, Child, Experiment, Registered, Thing

FAILURES = (MlflowException, SQLAlchemyError, OSError)
"""What an MLflow that is down, full or broken raises."""

URI = "MLFLOW_TRACKING_URI"
BATCH = 500  # metrics of one call; a server takes 1000, and 1 MB
PARAMS = 100  # parameters or tags of one call
DIGEST = 36  # characters of a dataset's digest that MLflow takes; the whole one is a tag of the input

T = TypeVar("T")


@dataclass
class _Held:
    """What MLflow holds of one of our runs."""

    id: str
    params: set[str] = field(default_factory=set)
    takes: set[str] = field(default_factory=set)
    makes: set[str] = field(default_factory=set)
    told: dict[str, int] = field(default_factory=dict)  # how many points of each series


class Tracking:
    """One run in one MLflow; to be thrown away after a failure, when nobody knows what MLflow holds."""

    def __init__(self, uri: str, experiment: Experiment, artifacts: Path | None) -> None:
        """Find what MLflow holds of the run.

        Args:
            uri: MLflow's tracking URI.
            experiment: The run.
            artifacts: Where a new experiment keeps files; a server decides itself.
        """
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self.id = self._experiment(experiment.name, artifacts)
        self.models: dict[str, str] = {}
        self.parent: _Held | None = None
        self.children: dict[str, _Held] = {}
        self.told: Experiment | None = None
        for run in self._all(self.client.search_runs, [self.id], f"tags.`lfm.run` = '{experiment.run}'"):
            held = _Held(
                run.info.run_id,
                set(run.data.params),
                {m.model_id for m in run.inputs.model_inputs},
                {m.model_id for m in run.outputs.model_outputs},
            )
            if "lfm.step" in run.data.tags:
                self.children[run.data.tags["lfm.step"]] = held
            else:
                self.parent = held

    def tell(self, experiment: Experiment) -> None:
        """Bring MLflow up to date."""
        before = self.told
        if self.parent is None:
            run = self.client.create_run(self.id, experiment.began, dict(experiment.tags), experiment.run)
            self.parent = _Held(run.info.run_id)
        known = {} if before is None else {c.step: c for c in before.children}
        for child in experiment.children:
            if child != known.get(child.step):
                self._child(child, self.parent.id)
        for registered in experiment.registered:
            if before is None or registered not in before.registered:
                self._register(registered)
        if before is None or (before.status, before.tags) != (experiment.status, experiment.tags):
            self._log(self.parent.id, tags=experiment.tags)
            self._state(self.parent.id, experiment.status, experiment.ended)
        self.told = experiment

    def _child(self, child: Child, parent: str) -> None:
        held = self.children.get(child.step)
        if held is None:
            tags = {**child.tags, "mlflow.parentRunId": parent}
            held = _Held(self.client.create_run(self.id, child.began, tags, child.step).info.run_id)
            self.children[child.step] = held
        new = {k: v for k, v in child.params.items() if k not in held.params}  # MLflow lets none change
        self._log(held.id, params=new, tags=child.tags)
        held.params |= new.keys()
        self._takes(child, held)
        judged = self._model_of(child, child.judged) if child.judged else None
        for name, points in child.series.items():
            start = held.told.get(name, 0)
            for some in _batches(points[start:], BATCH):
                metrics = [Metric(p.key, p.value, p.time, p.step, judged) for p in some]
                self.client.log_batch(held.id, metrics=metrics)
                start += len(some)
                held.told[name] = start
        if child.makes is not None and child.makes.kind in MODELS:
            model = self._model(child.makes, held.id, child.params)
            if model not in held.makes:
                self.client.log_outputs(held.id, [LoggedModelOutput(model, 0)])
                held.makes.add(model)
        self._state(held.id, child.status, child.ended)

    def _takes(self, child: Child, held: _Held) -> None:
        """The step's datasets and models; of a dataset MLflow itself sees that it has it."""
        datasets = [_dataset(t) for t in child.takes if t.kind == "dataset"]
        models = dict.fromkeys(self._model(t) for t in child.takes if t.kind in MODELS)
        new = [m for m in models if m not in held.takes]
        if datasets or new:
            self.client.log_inputs(held.id, datasets, [LoggedModelInput(m) for m in new])
            held.takes |= set(new)

    def _model_of(self, child: Child, digest: str) -> str:
        return self._model(next(t for t in child.takes if t.digest == digest))

    def _model(self, thing: Thing, maker: str | None = None, params: Mapping[str, str] | None = None) -> str:
        """MLflow's name for a model: one for each digest, its weights stay where they are."""
        if thing.digest not in self.models:
            wanted = f"tags.`lfm.digest` = '{thing.digest}'"
            found = self.client.search_logged_models([self.id], wanted, max_results=1)
            if found:
                model = found[0]
            else:
                tags = {"lfm.digest": thing.digest, "lfm.kind": thing.kind, "lfm.uri": thing.uri,
                        "mlflow.model.isExternal": "true"}  # fmt: skip
                model = self.client.create_logged_model(
                    self.id, re.sub(r"[/:.%\"']", "-", thing.name), maker, tags, dict(params or {}), thing.kind
                )
            if model.status != LoggedModelStatus.READY:
                self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self.models[thing.digest] = model.model_id
        return self.models[thing.digest]

    def _register(self, registered: Registered) -> None:
        """All versions of a name that MLflow lacks, in order, and where the aliases point."""
        name = registered.name
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
        numbers = {
            v.tags["lfm.version"]: v.version
            for v in self._all(self.client.search_model_versions, f"name = '{name}'")
            if "lfm.version" in v.tags
        }
        for version in registered.versions:
            if str(version.number) not in numbers:
                thing = Thing(edge="", name=version.step, kind=version.kind, digest=version.digest, uri="")
                model = self._model(thing)
                tags = {"lfm.version": str(version.number), "lfm.digest": version.digest, "lfm.run": version.run,
                        "lfm.step": version.step}  # fmt: skip
                with self._as_default():
                    made = self.client.create_model_version(
                        name, f"models:/{model}", tags=tags, model_id=model, await_creation_for=0
                    )
                numbers[str(version.number)] = made.version
        pointed = {a: str(n) for a, n in self.client.get_registered_model(name).aliases.items()}
        for alias, number in registered.aliases.items():
            if pointed.get(alias) != str(numbers[str(number)]):
                self.client.set_registered_model_alias(name, alias, numbers[str(number)])

    def _log(self, run: str, *, params: Mapping[str, str] | None = None, tags: Mapping[str, str]) -> None:
        for some in _batches([Param(k, v) for k, v in (params or {}).items()], PARAMS):
            self.client.log_batch(run, params=some)
        for some in _batches([RunTag(k, v) for k, v in tags.items()], PARAMS):
            self.client.log_batch(run, tags=some)

    def _state(self, run: str, status: str, ended: int | None) -> None:
        if ended is None:
            self.client.update_run(run, status=status)
        else:
            self.client.set_terminated(run, status, ended)

    def _experiment(self, name: str, artifacts: Path | None) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            where = None if artifacts is None else (artifacts / name).as_uri()
            return str(self.client.create_experiment(name, where))
        return str(found.experiment_id)

    def _all(self, search: Any, *wanted: Any) -> Iterator[Any]:
        """Every page of an answer."""
        page = search(*wanted)
        yield from page
        while page.token:
            page = search(*wanted, page_token=page.token)
            yield from page

    @contextmanager
    def _as_default(self) -> Iterator[None]:
        """MLflow's registry in a database asks the process's own MLflow for the model behind a version."""
        before = os.environ.get(URI)
        os.environ[URI] = self.uri
        try:
            yield
        finally:
            if before is None:
                del os.environ[URI]
            else:
                os.environ[URI] = before


def prepare(database: Path, artifacts: Path, scratch: Path) -> None:
    """Make MLflow's database, unless it is there: whole or not at all, however many want it at once.

    Its tables go through all of MLflow's migrations, so a kill on the way would leave a database that no MLflow takes.
    """
    if database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import Engine, event

    def hasten(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    made = scratch / database.name
    event.listen(Engine, "connect", hasten)
    try:
        SqlAlchemyStore(f"sqlite:///{made}", artifacts.as_uri()).engine.dispose()
    finally:
        event.remove(Engine, "connect", hasten)
    with made.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(made, database)
    except FileExistsError:
        return


def _dataset(thing: Thing) -> DatasetInput:
    source, about = _source(thing.uri)
    tags = [InputTag("mlflow.data.context", thing.edge), InputTag("lfm.digest", thing.digest)]
    return DatasetInput(MlflowDataset(thing.name, thing.digest[:DIGEST], source, json.dumps(about)), tags)


def _source(uri: str) -> tuple[str, dict[str, Any]]:
    """Where a dataset lies, as one of the sources that MLflow can open."""
    scheme, _, rest = uri.partition("://")
    if not rest:
        return "local", {"uri": uri}
    if scheme == "s3":
        return "s3", {"uri": uri}
    if scheme == "hf":
        name, _, revision = rest.partition("@")
        return "hugging_face", {"path": name, "revision": revision or None}
    return "code", {"tags": {"mlflow.source.name": uri}}


def _batches(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
