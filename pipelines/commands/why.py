"""`lfm why`: say why a step ran or was reused."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from pipelines.ancestry import results
from pipelines.commands._output import printed
from pipelines.commands._planned import known_step
from pipelines.lineage import find_run, history, states
from pipelines.storage.opening import open_storage
from pipelines.store import Store


def act(arguments: Namespace) -> int:
    """Say why a step ran or was reused."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    known_step(arguments.step, events)
    step = events[0].data["steps"][arguments.step]
    others = [r for r in results(Store(storage)) if r.components.get("operator") == step["operator"]]
    others = [r for r in others if r.fingerprint != step["fingerprint"]]
    nearest = min(others, key=lambda r: (len(differences(r.components, step["components"])), r.run), default=None)
    changed = {} if nearest is None else differences(nearest.components, step["components"])
    state = states(events, [arguments.step])[arguments.step]
    if arguments.json:
        close = nearest and {"run": nearest.run, "step": nearest.step}
        about = {"step": arguments.step, "state": state.state, "fingerprint": step["fingerprint"]}
        return printed({**about, "nearest": close, "changed": changed})
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
