"""What each command of the command line does."""

import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import psutil
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

import lfm as methods_package
from cluster.capacity import Capacity, here
from cluster.connect import cluster
from lfm.errors import UnknownName
from operators.artifact import kind_of
from operators.catalog import Catalog
from operators.code import Code, bring
from operators.resources import Resources
from pipelines.execute import memory_of
from pipelines.files import opened
from pipelines.inspector import Looks
from pipelines.lineage import (
    Ancestor,
    Event,
    Journal,
    ancestry,
    driver,
    find_artifact,
    find_run,
    history,
    new_run,
    results,
    runs,
    states,
    status,
)
from pipelines.plan import Plan, PlanError, plan as planned, survey
from pipelines.run import run as drive
from pipelines.schedule import infeasible
from pipelines.spec import SpecError, build, dump, names_in
from pipelines.storage import Storage, open_storage
from pipelines.store import Store
from pipelines.view import failure, row, seconds, table, view

HASHING_BYTES = 100 << 20  # files above this are named while they are hashed, which takes a while


def plan(arguments: Namespace) -> int:
    """Say what a run would do."""
    storage = open_storage(arguments.store)
    made = _plan(arguments, storage, there=_capacity(arguments.address))
    store = Store(storage)
    state = {n: _prospect(s.fingerprint, s.effect, store) for n, s in made.steps.items()}
    if arguments.json:
        steps = {n: {**_described(made, n), "state": state[n]} for n in made.steps}
        return _print({"name": made.spec.name, "inputs": _inputs(made), "steps": steps})
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "operator", "method", "takes", "makes", "asks", "state", "fingerprint"):
        rows.add_column(column)
    for name, step in made.steps.items():
        method = step.method[0] if step.method else ""
        takes = ", ".join(dict.fromkeys(_taken(step.inputs)))
        rows.add_row(name, step.operator, method, takes, step.kind, _asks(step.resources), state[name],
                     step.fingerprint[:12] or "unknown")  # fmt: skip
    _show(rows)
    for name, artifact in made.inputs.items():
        print(f"input {name}: {artifact.uri} digest {artifact.digest[:12] or 'unknown'}")
    return 0


def run(arguments: Namespace) -> int:
    """Run a pipeline."""
    storage = open_storage(arguments.store)
    there = _capacity(arguments.address) if arguments.address != "local" else here()
    made = _plan(arguments, storage, there=there, forced=tuple(arguments.force))
    journal = Journal.claim(storage, new_run(made.spec.name))
    return _drive(made, storage, journal, arguments, forced=tuple(arguments.force), retries=arguments.retries)


def resume(arguments: Namespace) -> int:
    """Go on with a run."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    began = history(storage, name)[0].data
    journal = Journal.claim(storage, name)
    code = Code(tuple(began["uses"]), tuple((k, v) for k, v in began["files"]))
    catalog = Catalog(bring(code))
    spec, problems = build(dict(began["spec"]), name, code=code, catalog=catalog)
    if problems:
        raise SpecError(tuple(problems))
    made = planned(spec, _inspector(storage), catalog, until=began["until"])
    return _drive(made, storage, journal, arguments, forced=(), retries=began["retries"])


def stop(arguments: Namespace) -> int:
    """End a run: its driver gets SIGTERM, writes down that it was interrupted, and takes its cluster with it."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    pid = driver(storage, name)
    if pid is None:
        print(f"run {name} is not going on")
        return 0
    os.kill(pid, signal.SIGTERM)
    try:
        psutil.Process(pid).wait(timeout=60)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        print(f"run {name}: process {pid} has not ended after 60 s, expected it to. End it with kill -9 {pid}.")
        return 1
    print(f"run {name} stopped")
    return 0


def ps(arguments: Namespace) -> int:
    """List runs."""
    storage = open_storage(arguments.store)
    found: list[dict[str, Any]] = []
    for name in runs(storage):
        events = history(storage, name)
        now = states(events, events[0].data["steps"])
        finished = sum(s.state in ("done", "reused") for s in now.values())
        found.append({"run": name, "status": status(storage, name, events), "began": events[0].time,
                      "ended": events[-1].time, "steps": len(now), "finished": finished})  # fmt: skip
    if arguments.json:
        return _print(found)
    rows = Table("run", "status", "began", "took", "steps", box=None, pad_edge=False, header_style="bold")
    for one in found:
        began = f"{datetime.fromtimestamp(one['began']):%Y-%m-%d %H:%M}"
        took = seconds(one["ended"] - one["began"])
        rows.add_row(one["run"], one["status"], began, took, f"{one['finished']}/{one['steps']}")
    _show(rows)
    return 0


def show(arguments: Namespace) -> int:
    """Show a run."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    began = events[0].data
    now = states(events, began["steps"])
    said = status(storage, name, events)
    if arguments.json:
        steps = {n: {**began["steps"][n], **asdict(s)} for n, s in now.items()}
        return _print({"run": name, "status": said, "began": events[0].time, "ended": events[-1].time,
                       "inputs": began["inputs"], "steps": steps})  # fmt: skip
    print(f"run {name}: {said}, {seconds(events[-1].time - events[0].time)}")
    _show(table({n: row(n, s, storage, time.time()) for n, s in now.items()}))
    for step, state in now.items():
        if state.state == "failed":
            print(failure(step, state.data, storage))
    return 0


def logs(arguments: Namespace) -> int:
    """Print what a step printed."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    _known_step(arguments.step, events)
    starts = [e.data for e in events if e.kind == "start" and e.step == arguments.step]
    wanted = [d for d in starts if d["attempt"] == arguments.attempt] if arguments.attempt else starts[-1:]
    if not wanted:
        print(f"step {arguments.step!r} of {name} has no such attempt: it was started {len(starts)} times here.")
        return 1
    sys.stdout.write((storage.read(wanted[0]["log"]) or b"").decode(errors="replace"))
    return 0


def why(arguments: Namespace) -> int:
    """Say why a step ran or was reused."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    _known_step(arguments.step, events)
    step = events[0].data["steps"][arguments.step]
    others = [r for r in results(Store(storage)) if r.components.get("operator") == step["operator"]]
    others = [r for r in others if r.fingerprint != step["fingerprint"]]
    nearest = min(others, key=lambda r: (len(differences(r.components, step["components"])), r.run), default=None)
    changed = {} if nearest is None else differences(nearest.components, step["components"])
    state = states(events, [arguments.step])[arguments.step]
    if arguments.json:
        close = nearest and {"run": nearest.run, "step": nearest.step}
        about = {"step": arguments.step, "state": state.state, "fingerprint": step["fingerprint"]}
        return _print({**about, "nearest": close, "changed": changed})
    if state.state == "reused":
        print(f"{arguments.step}: reused what run {state.data['run']} made, fingerprint {step['fingerprint'][:12]}.")
        return 0
    if nearest is None:
        print(f"{arguments.step}: {state.state}; the store has no other result of {step['operator']!r}.")
        return 0
    print(f"{arguments.step}: {state.state}; differs from step {nearest.step!r} of run {nearest.run} in:")
    for path, (before, after) in changed.items():
        print(f"  {path}: {before!r} -> {after!r}")
    return 0


def lineage(arguments: Namespace) -> int:
    """Print what an artifact came from."""
    store = Store(open_storage(arguments.store))
    found = ancestry(store, find_artifact(store, arguments.artifact))
    if arguments.json:
        return _print([asdict(a) for a in found])
    for one in found:
        print(ancestor_line(one))
    return 0


def ancestor_line(one: Ancestor) -> str:
    """One line of an ancestry: what it is, what made it, its digest."""
    role = f"{one.role}: " if one.role else ""
    origin = one.uri if one.made_by is None else f"{one.made_by.step} ({one.made_by.components['operator']})"
    method = one.made_by.components["method"] if one.made_by is not None else None
    return f"{'  ' * one.depth}{role}{one.kind} {origin}{f' {method[0]}' if method else ''} digest {one.digest}"


def methods(arguments: Namespace) -> int:
    """List every method."""
    families = {n.partition("/")[0] for n in methods_package.names()}
    if arguments.family and arguments.family not in families:
        raise UnknownName("family", arguments.family, sorted(families))
    found: list[dict[str, Any]] = []
    for name in methods_package.names(arguments.family or None):
        method = methods_package.find(name)
        about = (method.__doc__ or "").strip().partition("\n")[0]
        found.append({"name": name, "class": method.__name__, "reference": method.reference, "area": method.area,
                      "leaf": method.leaf, "about": about})  # fmt: skip
    if arguments.json:
        return _print(found)
    rows = Table("method", "class", "reference", "what for", box=None, pad_edge=False, header_style="bold")
    for one in sorted(found, key=lambda m: (m["area"], m["leaf"], m["name"])):
        rows.add_row(one["name"], one["class"], one["reference"], one["about"])
    _show(rows)
    return 0


def differences(before: Any, after: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two JSON values differ, by dotted path; None stands for what is not there."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*before, *after}):
            found |= differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        found = {}
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            found |= differences(one, other, f"{path}[{i}]")
        return found
    return {} if before == after else {path: (before, after)}


def _plan(arguments: Namespace, storage: Storage, *, there: Capacity, forced: tuple[str, ...] = ()) -> Plan:
    """Read and plan a pipeline; every problem of text, inputs and resources is reported at once."""
    pipeline = opened(arguments.pipeline, changes=arguments.changes)
    inspector = _inspector(storage, hashed=not getattr(arguments, "no_hash", False))
    problems = [*pipeline.problems, *survey(pipeline.spec, inspector, until=arguments.until)]
    problems += infeasible({n: s.resources for n, s in pipeline.spec.steps.items()}, there)
    problems += [f"--force: no step is called {n!r}." for n in forced if n not in pipeline.spec.steps]
    if problems:
        raise PlanError(tuple(problems))
    return planned(pipeline.spec, inspector, pipeline.catalog, until=arguments.until)


def _inspector(storage: Storage, *, hashed: bool = True) -> Looks:
    def say(path: str, size: int) -> None:
        if size > HASHING_BYTES:
            print(f"hashing {path}, {size / 1e9:.1f} GB", file=sys.stderr)

    return Looks(memory_of(storage), hash=hashed, hashing=say)


def _capacity(address: str) -> Capacity:
    if address == "local":
        return here()
    with cluster(address) as there:
        return there


def _drive(
    made: Plan,
    storage: Storage,
    journal: Journal,
    arguments: Namespace,
    *,
    forced: tuple[str, ...],
    retries: int,
) -> int:
    until = getattr(arguments, "until", "")
    data = {
        "run": journal.run,
        "spec": dump(replace(made.spec, inputs={**made.spec.inputs, **made.inputs})),
        "uses": list(made.spec.code.uses),
        "files": [list(f) for f in made.spec.code.files],
        "until": until,
        "retries": retries,
        "inputs": _inputs(made),
        "steps": {n: _described(made, n) for n in made.steps},
        "version": version("learn-from-model"),
    }
    started = Event("started", data=data, time=time.time())
    journal.write([started])
    with view(made, storage) as watch:
        watch([started])
        said = drive(
            made,
            Store(storage),
            journal,
            connect=_connect(arguments.address),
            forced=forced,
            max_failures=retries,
            watch=watch,
        )
    if arguments.json:
        now = states(history(storage, journal.run), made.steps)
        _print({"run": journal.run, "status": said, "steps": {n: asdict(s) for n, s in now.items()}})
    return {"done": 0, "failed": 1, "interrupted": 130}[said]


def _connect(address: str) -> Callable[[], AbstractContextManager[Capacity]]:
    return partial(cluster, address)


def _described(made: Plan, name: str) -> dict[str, Any]:
    step = made.steps[name]
    return {
        "operator": step.operator,
        "method": step.method and {"name": step.method[0], **step.method[1]},
        "params": dict(step.params),
        "inputs": {k: list(r) if isinstance(r, tuple) else r for k, r in step.inputs.items()},
        "resources": TypeAdapter(Resources).dump_python(step.resources),
        "kind": step.kind,
        "effect": step.effect,
        "needs": list(step.needs),
        "fingerprint": step.fingerprint,
        "components": dict(step.components),
    }


def _inputs(made: Plan) -> dict[str, dict[str, str]]:
    return {k: {"kind": kind_of(type(a)), "uri": a.uri, "digest": a.digest} for k, a in made.inputs.items()}


def _prospect(fingerprint: str, effect: bool, store: Store) -> str:
    if effect:
        return "runs (effect)"
    if not fingerprint:
        return "unknown"
    return "stored" if store.hit(fingerprint) else "runs"


def _asks(resources: Resources) -> str:
    workers = f"{resources.workers} x " if resources.workers > 1 else ""
    gpus = f", {resources.gpus_per_worker:g} {resources.accelerator}" if resources.gpus else ""
    return f"{workers}{resources.cpus_per_worker:g} CPU{gpus}"


def _taken(inputs: Mapping[str, Any]) -> list[str]:
    return [n for r in inputs.values() for n in names_in(r)]


def _known_step(step: str, events: list[Event]) -> None:
    known = tuple(events[0].data["steps"])
    if step not in known:
        raise UnknownName("step", step, known)


def _print(value: Any) -> int:
    print(json.dumps(value, indent=2, default=str))
    return 0


def _show(rows: Table) -> None:
    """A table as wide as it needs to be where nobody's terminal sets a width."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(rows)
