"""Task -> outcome: what happens inside the process that runs one step."""

import faulthandler
import functools
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import TypeAdapter

from lfm.errors import LfmError
from operators.artifact import Artifact, kind_of
from operators.catalog import Catalog
from operators.code import Code, bring
from operators.resources import Resources
from operators.sharing.notices import NodeLost, Notices, Preempted, Stopped, recalled
from operators.workspace import Trials
from pipelines.failures import classify
from pipelines.faults import reached
from pipelines.inputs.inspector import STORED, InputChanged, Looks, fetch
from pipelines.printing import Unwritten, logged
from pipelines.registry import Registry
from pipelines.storage.base import DamagedFolder, Storage, StorageFailed, cache, remove
from pipelines.storage.digests import Digests
from pipelines.storage.opening import open_storage
from pipelines.store import MANIFEST, DamagedArtifact, MissingArtifact, Result, Store, canonical, damaged, described

LATE_S = 2.0  # after its time is over a step is ended, so that its driver, who hears later that it began, knows why
NAMED = 16  # letters of a checkpoint's digest that are in its name

A = TypeVar("A", bound=Artifact)


class NothingSaved(LfmError, TypeError):
    """An operator that returned something else than what `Workspace.save` gave it."""

    def __init__(self, operator: str, got: str) -> None:
        super().__init__(operator, got)
        self.operator, self.got = operator, got

    def __str__(self) -> str:
        return f"Operator {self.operator!r}: returned a {self.got}, expected what work.save(...) gave it."


class Terminated(SystemExit):
    """Somebody asked the step's process to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One attempt at one step, as plain data: nothing in it needs the user's modules to be unpickled.

    Attributes:
        inputs: What fills each edge: an artifact, several, or several by name. Those of other steps have a digest
            and no URI.
        earlier: As a `PlannedStep` has it.
    """

    store: str
    run: str
    step: str
    attempt: int
    operator: str
    method: tuple[str, Mapping[str, Any]] | None
    params: Mapping[str, object]
    inputs: Mapping[str, Any]
    resources: Resources
    effect: bool
    fingerprint: str
    components: Mapping[str, Any]
    code: Code
    earlier: tuple[tuple[int, str], ...] = ()

    @property
    def log(self) -> str:
        """The key of what the step prints."""
        return f"runs/{self.run}/logs/{self.step}/{self.attempt}.log"

    @property
    def measures(self) -> str:
        """The key of how far it is and what it measures: lines of JSON."""
        return f"runs/{self.run}/measures/{self.step}/{self.attempt}.jsonl"

    @property
    def groups(self) -> str:
        """The key of how many workers share its work since when: lines of JSON."""
        return f"runs/{self.run}/groups/{self.step}/{self.attempt}.jsonl"


def execute(task: Task) -> dict[str, Any]:
    """Run one step and commit what it made.

    Returns:
        ``{"kind": "commit", "digest", "about", "seconds"}``, with ``"made"`` where it made another digest than the one
        that its fingerprint stands for already, or ``{"kind": "fail", "error", "class", "sentence", "log",
        "seconds"}``: a failure is an answer too, so that no error of a step has to be unpickled elsewhere. Where
        storage refused some of what it printed or measured, ``"unwritten"`` says why.
    """
    # Ray ignores it behind Python's back, in its workers too: then every child's exit code would read 0.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    began = time.monotonic()
    unwritten = Unwritten()
    try:
        storage = open_storage(task.store)
    except LfmError as error:
        return {**_failed(error, task), "seconds": time.monotonic() - began}
    reached("step: began")
    with logged(storage, task.log, unwritten), _as_before():
        _end_on_sigterm()
        try:
            with _ended_after(task.resources.timeout):
                done = _perform(task, storage, unwritten)
        except (Exception, SystemExit) as error:  # the one place that turns a failure into an event
            traceback.print_exc()
            done = _failed(error, task)
            print(f"Step {task.step!r} failed with {done['error']}: {done['sentence']}", file=sys.stderr)
    said = {"unwritten": unwritten.why} if unwritten.why else {}
    return {**done, **said, "seconds": time.monotonic() - began}


def _failed(error: BaseException, task: Task) -> dict[str, Any]:
    sentence = str(error).strip() or type(error).__name__
    said = {"error": type(error).__name__, "class": classify(error).value, "sentence": sentence}
    lost = {"lost": error.digest} if isinstance(error, DamagedArtifact | MissingArtifact) else {}
    nodes = {"nodes": list(error.nodes)} if isinstance(error, NodeLost) else {}
    return {"kind": "fail", **said, **lost, **nodes, "log": task.log}


def _perform(task: Task, storage: Storage, unwritten: Unwritten) -> dict[str, Any]:
    store = Store(storage)
    began = time.monotonic()
    catalog = Catalog(modules(task.code))
    verb = catalog.operator(task.operator)
    arguments = {**verb.validated(task.params), **fetched(task.inputs, store)}
    if task.method is not None and verb.family is not None:
        name, fields = task.method
        arguments["method"] = TypeAdapter(catalog.method(verb.family, name)).validate_python(dict(fields))
    reached("step: inputs are here")
    scratch = storage.scratch()
    work = _Workspace(scratch, task, storage, unwritten)
    try:
        try:
            with _threads(task.resources):
                made = verb.body(work, **arguments)
        except Preempted as left:
            if recalled():
                raise Stopped(left.done, left.total) from None
            raise
        finally:
            work.flush()  # what it measured last often says why it failed
        reached("step: body is done")
        if not isinstance(made, verb.gives):
            raise NothingSaved(task.operator, type(made).__name__)
        digest = made.digest or store.put(made.path, kind_of(type(made)), made.about)
    finally:
        remove(scratch)
    result = Result(
        fingerprint=task.fingerprint,
        kind=kind_of(type(made)),
        digest=digest,
        about=dict(made.about),
        run=task.run,
        step=task.step,
        seconds=time.monotonic() - began,
        inputs={**_sources(task.inputs), **(_sources({"best": made}) if verb.repeats else {})},
        components=task.components,
        uri=_place(task.inputs, made.digest) if made.digest else "",
    )
    if not task.effect:
        result = store.commit(result)
    work.forget()
    reached("step: checkpoints are gone")
    done = {"kind": "commit", "artifact": result.kind, "digest": result.digest, "about": dict(result.about)}
    if result.digest != digest:  # of two results the first stays
        done["made"] = digest
    return {**done, "uri": result.uri} if result.uri else done


class _Workspace:
    """The `Workspace` of one attempt."""

    FLUSH_S = 0.5  # how old the last line that a reader sees may be
    PATIENCE = 50  # times what it took to write it: a slow storage costs a step a fiftieth of its time at most

    def __init__(self, scratch: Path, task: Task, storage: Storage, unwritten: Unwritten) -> None:
        self.scratch, self.resources = scratch, task.resources
        self._unwritten = unwritten
        self.seed = int(task.fingerprint[:12], 16)
        self._storage, self._key, self._made_by = storage, task.measures, (task.run, task.step)
        self._groups = task.groups
        self._keep_at, self._earlier = checkpoints_of(task.fingerprint), task.earlier
        self._lines: list[dict[str, Any]] = []
        self._due = 0.0
        self._trusted: set[str] = set()  # checkpoints that this process has made or looked through
        self._notices = Notices()

    def progress(self, done: int, total: int, **measures: float) -> None:
        line = {"done": done, "total": total, "time": time.time()}
        self._lines.append({**line, "measures": measures} if measures else line)
        if time.monotonic() > self._due:
            self.flush()

    def flush(self) -> None:
        """Write what measures something, and the newest line, which says how far the step is."""
        began = time.monotonic()
        worth = [e for e in self._lines[:-1] if "measures" in e] + self._lines[-1:]
        if worth:
            with self._unwritten.noted():
                self._storage.append(self._key, "".join(f"{json.dumps(e)}\n" for e in worth).encode())
        self._lines.clear()
        now = time.monotonic()
        self._due = now + max(self.FLUSH_S, self.PATIENCE * (now - began))

    def keep(self, folder: Path) -> None:
        self.flush()  # what was measured up to here is not measured again by who goes on from it
        older = self._checkpoints(self._keep_at)
        number = int(older[-1].partition("-")[0]) + 1 if older else 1
        name = f"{number:06}-{_listed(folder)}"
        self._storage.adopt(folder, f"{self._keep_at}/{name}")
        self._trusted.add(name)
        reached("keep: checkpoint is in")
        for gone in older[:-1]:  # the one before stays, should this one turn out damaged
            self._storage.delete(f"{self._keep_at}/{gone}")

    def kept(self) -> Path | None:
        own = self._newest(self._keep_at)
        others = ((at, self._newest(checkpoints_of(fingerprint))) for at, fingerprint in self._earlier)
        return own or next((found for at, found in others if found is not None and _far(found) <= at), None)

    def _newest(self, folder: str) -> Path | None:
        """The newest checkpoint of a folder that is what was kept; damaged ones go."""
        for name in reversed(self._checkpoints(folder)):
            key = f"{folder}/{name}"
            damaged = "" if name in self._trusted else self._damaged(key)
            if not damaged:
                self._trusted.add(name)
                return self._storage.fetch(key)
            print(f"Checkpoint {name}: {damaged!r} is not what was kept, so it counts as lost.", file=sys.stderr)
            self._storage.discard(key, f"quarantine/{name}")
        return None

    def leaving(self) -> bool:
        return self._notices.leaving()

    def regrouped(self, workers: int, why: str) -> None:
        with self._unwritten.noted():
            self._storage.append(self._groups, f"{json.dumps({'workers': workers, 'why': why})}\n".encode())

    def _damaged(self, key: str) -> str:
        """A file of a checkpoint that is not what was kept; empty where all are."""
        try:
            folder = self._storage.fetch(key)
            manifest = (folder / MANIFEST).read_bytes()
            if hashlib.sha256(manifest).hexdigest()[:NAMED] != key.rpartition("-")[2]:
                return MANIFEST
            return damaged(folder, json.loads(manifest)["files"], Digests(memory_of(self._storage)))
        except DamagedFolder as damage:
            return damage.file
        except ValueError:
            return MANIFEST

    def forget(self) -> None:
        """Drop the checkpoints, which nobody needs once the step's result is there; what stays, `lfm gc` finds."""
        try:
            for name in self._checkpoints(self._keep_at):
                self._storage.delete(f"{self._keep_at}/{name}")
        except StorageFailed as error:
            print(f"Checkpoints of a finished step stay: {error.where}: {error.what}.", file=sys.stderr)

    def _checkpoints(self, folder: str) -> list[str]:
        """The names of the whole ones, oldest first: a manifest is what `adopt` moves in last."""
        keys = (k.removeprefix(f"{folder}/").split("/") for k in self._storage.list(folder))
        return sorted(name for name, *rest in keys if rest == [MANIFEST])

    def save(self, kind: type[A], path: Path, about: Mapping[str, object] | None = None) -> A:
        return kind(str(path), "", dict(about or {}))

    def register(self, artifact: Artifact, name: str, alias: str) -> int:
        registry, (run, step) = Registry(self._storage), self._made_by
        kind, about = kind_of(type(artifact)), artifact.about
        version = registry.register(name, artifact.digest, kind, run=run, step=step, about=about)
        registry.point(name, alias, version.number)
        return version.number

    def trials(self) -> Trials:
        from pipelines.trials import Repeated  # which drives runs, and so has what this file serves

        return Repeated.of(self._storage, *self._made_by)


def checkpoints_of(fingerprint: str) -> str:
    """The folder that a step's checkpoints are kept in."""
    return f"checkpoints/{fingerprint}"


def _far(checkpoint: Path) -> int:
    """After how many steps a training has kept it."""
    return int(json.loads((checkpoint / MANIFEST).read_bytes())["step"])


def _listed(folder: Path) -> str:
    """Add to a checkpoint's manifest what its other files are; returns how that manifest's digest begins."""
    path = folder / MANIFEST
    files = (p for p in folder.rglob("*") if p.is_file() and p != path)
    manifest = canonical({**json.loads(path.read_bytes()), "files": described(folder, files)})
    path.write_bytes(manifest)
    return hashlib.sha256(manifest).hexdigest()[:NAMED]


def fetched(inputs: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """Every input with a local path."""

    def one(artifact: Artifact) -> Artifact:
        if not artifact.uri or artifact.uri.startswith(STORED):
            return store.verified(artifact.digest, Digests(memory_of(store.storage)))
        if "://" not in artifact.uri:
            now = Looks(memory_of(store.storage), store).pin(replace(artifact, digest=""))
            if now.digest != artifact.digest:
                raise InputChanged(artifact.uri)
        return fetch(artifact)

    return {k: _each(v, one) for k, v in inputs.items()}


def memory_of(storage: Storage) -> Path:
    """Where digests of local inputs are remembered: beside a local store, else in the user's cache."""
    if "://" not in storage.uri:
        return Path(storage.uri) / "inputs.sqlite"
    return cache() / "inputs.sqlite"


def _sources(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Where each input came from, as JSON, in the shape of what fills its edge."""

    def one(artifact: Artifact) -> dict[str, str]:
        return {"kind": kind_of(type(artifact)), "digest": artifact.digest, "uri": artifact.uri}

    return {k: _each(v, one) for k, v in inputs.items()}


def _place(inputs: Mapping[str, Any], digest: str) -> str:
    """Where an input is that a step hands on: empty where that is the store."""
    found: list[str] = []

    def one(artifact: Artifact) -> None:
        if artifact.digest == digest and not artifact.uri.startswith(STORED):
            found.append(artifact.uri)

    for filled in inputs.values():
        _each(filled, one)
    return found[0] if found else ""


def _each(filled: Any, act: Callable[[Artifact], Any]) -> Any:
    """`act` on every artifact of an edge, in the shape of what fills it."""
    if isinstance(filled, Artifact):
        return act(filled)
    if isinstance(filled, Mapping):
        return {k: act(v) for k, v in filled.items()}
    return [act(v) for v in filled]


@functools.lru_cache(maxsize=1)
def modules(code: Code) -> tuple[ModuleType, ...]:
    """The user's modules; a warm worker imports the same files once."""
    return bring(code)


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process when something takes longer, whatever it does then; its log says where it was.

    Nobody else can without a race: a step whose children are ended before itself may take that for their own end, and
    commit.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds + LATE_S, exit=True, file=2)
    try:
        yield
    finally:
        if seconds:
            faulthandler.cancel_dump_traceback_later()


def _end_on_sigterm() -> None:
    """Tell who asks a step to end, such as a node that goes, from code that exits by itself."""

    def end(number: int, frame: object) -> None:
        raise Terminated("its process was asked to end (SIGTERM)")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)


@contextmanager
def _as_before() -> Iterator[None]:
    """Undo what a step changes of its process, which the next step gets: folder, environment, signals, randomness."""
    folder, environment, drawn = Path.cwd(), dict(os.environ), random.getstate()
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    numpy_drawn = numpy.random.get_state() if numpy else None
    torch_drawn = torch.get_rng_state() if torch else None
    try:
        yield
    finally:
        os.chdir(folder)
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)
        random.setstate(drawn)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if numpy:
            numpy.random.set_state(numpy_drawn)
        if torch:
            torch.set_rng_state(torch_drawn)


@contextmanager
def _threads(resources: Resources) -> Iterator[None]:
    """Give torch as many threads as the step has CPUs, where the step's modules use it."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(resources.cpus_per_worker)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
