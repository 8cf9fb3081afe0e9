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

from pipelines.faults import reached
from pipelines.tracking.experiment import MODELS, Child, Experiment, Point, Registered, Thing

FAILURES = (MlflowException, SQLAlchemyError, OSError)
"""What an MLflow that is down, full or broken raises."""

URI = "MLFLOW_TRACKING_URI"
BATCH = 500  # metrics of one call; a server takes 1000, and 1 MB
PARAMS = 100  # parameters or tags of one call
VERSION = ("lfm.version", "lfm.digest", "lfm.run", "lfm.step")
"""The tags by which a version is ours: another store's of the same name has the same number."""
DIGEST = 36  # characters of a dataset's digest that MLflow takes; the whole one is a tag of the input

T = TypeVar("T")


@dataclass
class _Held:
    """What MLflow holds of one of our runs."""

    id: str
    tags: dict[str, str]
    params: set[str] = field(default_factory=set)
    takes: set[str] = field(default_factory=set)
    makes: set[str] = field(default_factory=set)
    told: dict[str, int] = field(default_factory=dict)  # how many points of each series
    state: tuple[str, int | None] | None = None


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
        self.told: Experiment | None = None
        steps: list[_Held] = []
        for found in self._all(self.client.search_runs, [self.id], f"tags.`lfm.run` = '{experiment.run}'"):
            run = self.client.get_run(found.info.run_id)  # a search leaves its models out
            held = _Held(
                run.info.run_id,
                dict(run.data.tags),
                set(run.data.params),
                {m.model_id for m in run.inputs.model_inputs},
                {m.model_id for m in run.outputs.model_outputs},
                state=(run.info.status, run.info.end_time),
            )
            if "lfm.step" in held.tags:
                steps.append(held)
            elif run.info.start_time == experiment.began:  # in another store another run may have the name
                self.parent = held
        below = None if self.parent is None else self.parent.id
        self.children = {h.tags["lfm.step"]: h for h in steps if h.tags.get("mlflow.parentRunId") == below}

    def tell(self, experiment: Experiment) -> None:
        """Bring MLflow up to date."""
        before = self.told
        tags = {**experiment.tags, **self._below(experiment.below)}
        if self.parent is None:
            self.parent = self._run(experiment.run, experiment.began, tags)
        known = {} if before is None else {c.step: c for c in before.children}
        for child in experiment.children:
            if child != known.get(child.step):
                self._child(child, self.parent.id)
        for registered in experiment.registered:
            if before is None or registered not in before.registered:
                self._register(registered)
        self._log(self.parent, experiment.params, tags)
        self._points(self.parent, "judged", experiment.points)
        self._state(self.parent, experiment.status, experiment.ended)
        self.told = experiment

    def _below(self, run: str) -> dict[str, str]:
        """The tag that puts a trial below the run that searches, where MLflow has heard of that."""
        if not run:
            return {}
        found = self._all(self.client.search_runs, [self.id], f"tags.`lfm.run` = '{run}'")
        ids = [r.info.run_id for r in found if "lfm.step" not in r.data.tags]
        return {"lfm.trial_of": run, **({"mlflow.parentRunId": ids[0]} if ids else {})}

    def _child(self, child: Child, parent: str) -> None:
        held = self.children.get(child.step)
        if held is None:
            held = self._run(child.step, child.began, {**child.tags, "mlflow.parentRunId": parent})
            self.children[child.step] = held
        self._log(held, child.params, child.tags)
        self._takes(child, held)
        judged = next((self._model(t) for t in child.takes if t.digest == child.judged), None)
        for name, points in child.series.items():
            self._points(held, name, points, judged)
        if child.makes is not None and child.makes.kind in MODELS:
            model = self._model(child.makes, held.id, child.params)
            if model not in held.makes:
                self.client.log_outputs(held.id, [LoggedModelOutput(model, 0)])
                reached("tell: outputs are in")
                held.makes.add(model)
        self._state(held, child.status, child.ended)

    def _points(self, held: _Held, name: str, points: Sequence[Point], model: str | None = None) -> None:
        """The points of a series that were not told yet; `model` is what they speak of."""
        for some in _batches(points[held.told.get(name, 0) :], BATCH):
            metrics = [Metric(p.key, p.value, p.time, p.step, model) for p in some]
            self.client.log_batch(held.id, metrics=metrics)
            reached("tell: points are in")
            held.told[name] = held.told.get(name, 0) + len(some)

    def _run(self, name: str, began: int, tags: Mapping[str, str]) -> _Held:
        made = self.client.create_run(self.id, began, dict(tags), name)
        reached("tell: run is made")
        return _Held(made.info.run_id, dict(tags))

    def _takes(self, child: Child, held: _Held) -> None:
        """The step's datasets and models; of a dataset MLflow itself sees that it has it."""
        datasets = [_dataset(t) for t in child.takes if t.kind == "dataset"]
        models = dict.fromkeys(self._model(t) for t in child.takes if t.kind in MODELS)
        new = [m for m in models if m not in held.takes]
        if datasets or new:
            self.client.log_inputs(held.id, datasets, [LoggedModelInput(m) for m in new])
            reached("tell: inputs are in")
            held.takes |= set(new)

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
                reached("tell: model is made")
            if model.status != LoggedModelStatus.READY:
                self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
                reached("tell: model is ready")
            self.models[thing.digest] = model.model_id
        return self.models[thing.digest]

    def _register(self, registered: Registered) -> None:
        """All versions of a name that MLflow lacks, in order, and where the aliases point."""
        name = registered.name
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
            reached("tell: name is made")
        numbers = {
            tuple(v.tags.get(t) for t in VERSION): v.version
            for v in self._all(self.client.search_model_versions, f"name = '{name}'")
        }
        ours: dict[int, Any] = {}
        for version in registered.versions:
            tags = dict(zip(VERSION, (str(version.number), version.digest, version.run, version.step), strict=True))
            ours[version.number] = numbers.get(tuple(tags.values()))
            if ours[version.number] is None:
                thing = Thing(edge="", name=version.step, kind=version.kind, digest=version.digest, uri="")
                model = self._model(thing)
                with self._as_default():
                    made = self.client.create_model_version(
                        name, f"models:/{model}", tags=tags, model_id=model, await_creation_for=0
                    )
                reached("tell: version is made")
                ours[version.number] = made.version
        pointed = {a: str(n) for a, n in self.client.get_registered_model(name).aliases.items()}
        for alias, number in registered.aliases.items():
            if pointed.get(alias) != str(ours[number]):
                self.client.set_registered_model_alias(name, alias, ours[number])
                reached("tell: alias has moved")

    def _log(self, held: _Held, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Parameters and tags that a run lacks; MLflow lets no parameter change, so the first value stays."""
        fresh = [Param(k, v) for k, v in params.items() if k not in held.params]
        changed = [RunTag(k, v) for k, v in tags.items() if held.tags.get(k) != v]
        for start in range(0, max(len(fresh), len(changed)), PARAMS):
            end = start + PARAMS
            self.client.log_batch(held.id, params=fresh[start:end], tags=changed[start:end])
            reached("tell: parameters and tags are in")
        held.params |= params.keys()
        held.tags |= tags

    def _state(self, held: _Held, status: str, ended: int | None) -> None:
        if held.state == (status, ended):
            return
        if ended is None:
            self.client.update_run(held.id, status=status)
        else:
            self.client.set_terminated(held.id, status, ended)
        reached("tell: run has its state")
        held.state = status, ended

    def _experiment(self, name: str, artifacts: Path | None) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            where = None if artifacts is None else (artifacts / name).as_uri()
            made = str(self.client.create_experiment(name, where))
            reached("tell: experiment is made")
            return made
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
