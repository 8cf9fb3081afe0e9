"""Journals -> how long steps took in earlier runs, by what they were; and what one run took, its trials' too."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipelines.lineage import Event, by_driver, history, runs, trials
from pipelines.spec import names_in
from pipelines.storage.base import Storage, at_once
from pipelines.usage import Usage, usage

LOOKED_AT = 50
"""The newest runs: what is older was mostly another version."""
DECIDES = ("workers", "strategy", "offload", "cpus_per_worker", "gpus_per_worker", "accelerator")
"""What a step asks for that decides how long it takes."""


def shapes(steps: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """A name for what each step does, and on what: equal for two that differ in seeds and in what inputs contain.

    Args:
        steps: As a journal has them.
        inputs: The same.
    """
    found: dict[str, str] = {}

    def of(name: str) -> str:
        if name in inputs:
            return inputs[name]["uri"].partition("@")[0]
        if name not in found and name in steps:
            step = steps[name]
            said = {
                "operator": step["operator"],
                "method": step["method"],
                "params": {k: v for k, v in step["params"].items() if k != "seed"},
                "resources": {k: step["resources"][k] for k in DECIDES},
                "inputs": {k: [of(n) for n in names_in(_reference(r))] for k, r in step["inputs"].items()},
            }
            canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
            found[name] = hashlib.sha256(canonical.encode()).hexdigest()
        return found.get(name, "")

    for name in steps:
        of(name)
    return found


def _reference(said: Any) -> Any:
    return tuple(said) if isinstance(said, list) else said


def taken(storage: Storage) -> dict[str, list[float]]:
    """Seconds that steps took, by shape, in the newest runs of a store."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in runs(storage)[-LOOKED_AT:]:
        for driver in by_driver(history(storage, run)):
            known = shapes(driver[0].data["steps"], driver[0].data["inputs"])
            for event in driver:
                if event.kind == "commit" and event.step in known:
                    found[known[event.step]].append(float(event.data["seconds"]))
    return dict(found)


def used(storage: Storage, run: str, events: Sequence[Event], now: float = 0.0) -> Usage | None:
    """What a run took, as `usage` has it; its trials are read where it searches."""
    searches = any(s["operator"] == "search" for own in by_driver(events) for s in own[0].data["steps"].values())
    names = trials(storage, run) if searches and any(own[0].data.get("profile") for own in by_driver(events)) else []
    found = dict(zip(names, at_once(partial(history, storage), names), strict=True))
    return usage(events, {name: said for name, said in found.items() if said}, now)
