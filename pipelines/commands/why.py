"""`lfm why`: say why a step ran or was reused."""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.ancestry import results, sources
from pipelines.commands._output import printed
from pipelines.commands._planned import known_step
from pipelines.lineage import Event, StepState, by_driver, find_run, history, runs, states
from pipelines.storage.base import Storage
from pipelines.storage.opening import open_storage
from pipelines.store import Result, Store

SHOWN = 12  # letters of a digest


def act(arguments: Namespace) -> int:
    """Say why a step ran or was reused."""
    storage = open_storage(arguments.store)
    name = find_run(storage, arguments.run)
    events = history(storage, name)
    known_step(arguments.step, events)
    found = _reason(storage, name, events, arguments.step)
    if arguments.json:
        return printed(found.told())
    for line in found.lines():
        print(line)
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reason:
    """Why a step of a run ran or was reused.

    Attributes:
        planned: The step as the run's journal has it.
        forced: Whether it was asked to run in any case.
        before: Which run had made the same, and with which digest.
        nearest: The stored result of the same operator whose fingerprint is another one for the fewest reasons.
        changed: These reasons: by dotted path what it was there and is here.
        remade: For each edge what the step took and what the step that makes it stands for now, where these differ.
    """

    run: str
    step: str
    planned: Mapping[str, Any]
    state: StepState
    forced: bool
    before: tuple[str, str] | None
    nearest: Result | None
    changed: Mapping[str, tuple[Any, Any]]
    remade: Mapping[str, tuple[str, str]]

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "step": self.step,
            "state": self.state.state,
            "fingerprint": self.planned["fingerprint"],
            "effect": self.planned["effect"],
            "unhashed": self.planned["unhashed"],
            "forced": self.forced,
            "before": self.before and dict(zip(("run", "digest"), self.before, strict=True)),
            "nearest": self.nearest and {"run": self.nearest.run, "step": self.nearest.step},
            "changed": self.changed,
            "remade": self.remade,
        }

    def lines(self) -> list[str]:
        """In words."""
        return [f"{self.step}: {self.state.state}{self._why()}", *self._changes(), *self._remade()]

    def _why(self) -> str:
        if self.state.state == "reused":
            return f" what run {self.state.data['run']} made, fingerprint {self.planned['fingerprint'][:SHOWN]}."
        if self.planned["effect"]:
            return f"; {self.planned['operator']!r} changes the world, which each run does again."
        if self.planned["unhashed"]:
            return f"; never reused, for it has no fingerprint: {', '.join(self.planned['unhashed'])}."
        if self.before is not None:
            run, digest = self.before
            asked = "--force asked for it" if self.forced else "the store did not have that whole any more"
            return f"; run {run} had made the same, but {asked}.{self._again(digest)}"
        if self.nearest is None:
            return f"; the store has no other result of {self.planned['operator']!r}."
        return f"; differs from step {self.nearest.step!r} of run {self.nearest.run} in:"

    def _again(self, before: str) -> str:
        """What came of doing it again."""
        stays = str(self.state.data.get("digest", ""))
        now = str(self.state.data.get("made", stays))
        if now in ("", before):
            return ""
        kept = "which stays" if stays == before else "and what was made of that one stays"
        return f" It made digest {now[:SHOWN]} where that was {before[:SHOWN]}, {kept}."

    def _changes(self) -> list[str]:
        explained = self.state.state == "reused" or self.planned["effect"] or self.planned["unhashed"] or self.before
        if explained:
            return []
        names = _names(self.planned["inputs"])
        return [
            f"  {path}{f' ({names[path]})' if path in names else ''}: {_short(b)!r} -> {_short(a)!r}"
            for path, (b, a) in self.changed.items()
        ]

    def _remade(self) -> list[str]:
        return [
            f"  {edge}: it took digest {took[:SHOWN]}, and what makes that stands for digest {now[:SHOWN]} now."
            for edge, (took, now) in self.remade.items()
        ]


def _reason(storage: Storage, run: str, events: Sequence[Event], step: str) -> _Reason:
    planned = events[0].data["steps"][step]
    state = states(events, [step])[step]
    stored = {r.fingerprint: r for r in results(Store(storage))}
    others = [
        r
        for r in stored.values()
        if r.components.get("operator") == planned["operator"] and r.fingerprint != planned["fingerprint"]
    ]

    def nearness(other: Result) -> tuple[int, bool, str]:
        return -len(differences(other.components, planned["components"])), other.step == step, other.run

    nearest = max(others, key=nearness, default=None)
    return _Reason(
        run=run,
        step=step,
        planned=planned,
        state=state,
        forced=any(step in own[0].data.get("forced", ()) for own in by_driver(events)),
        before=_before(storage, run, planned["fingerprint"], state.began) if state.state != "reused" else None,
        nearest=nearest,
        changed={} if nearest is None else differences(nearest.components, planned["components"]),
        remade=_remade(stored, planned["fingerprint"]),
    )


def _before(storage: Storage, run: str, fingerprint: str, began: float) -> tuple[str, str] | None:
    """The run that had made something for a fingerprint when `run` began to, and its digest; the last one counts."""
    for name in (n for n in reversed(runs(storage)) if n <= run):
        events = history(storage, name)
        steps = {n for n, s in events[0].data["steps"].items() if s["fingerprint"] == fingerprint}
        for event in reversed(events):
            if event.step in steps and event.kind in ("commit", "reuse") and event.time < began:
                return event.data.get("run", name), event.data["digest"]
    return None


def _names(inputs: Mapping[str, Any]) -> dict[str, str]:
    """What fills each edge, by where its fingerprint stands among a step's components."""
    found = {}
    for edge, filled in inputs.items():
        named = filled.items() if isinstance(filled, Mapping) else enumerate(_listed(filled))
        for key, name in named:
            found[f"inputs.{edge}[{key}]" if isinstance(key, int) else f"inputs.{edge}.{key}"] = name
    return found


def _listed(filled: Any) -> list[str]:
    return [filled] if isinstance(filled, str) else list(filled)


def _short(value: Any) -> Any:
    """The beginning of a fingerprint, and anything else as it is."""
    return value[:SHOWN] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def _remade(stored: Mapping[str, Result], fingerprint: str) -> dict[str, tuple[str, str]]:
    """Where what a step took is not what its maker's fingerprint stands for now."""
    found = stored.get(fingerprint)
    took = [] if found is None else [(e, one["digest"], stored.get(maker)) for e, one, maker in sources(found)]
    return {edge: (digest, now.digest) for edge, digest, now in took if now is not None and now.digest != digest}


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
