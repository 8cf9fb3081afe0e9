"""`lfm plan`: say what a run would do."""

from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from cluster.profile import GIB, Profile
from operators.resources import Resources
from pipelines.beginning import described, inputs_of
from pipelines.commands._output import printed, shown
from pipelines.commands._planned import estimated, read_plan
from pipelines.estimates import Estimate, Range, Total, plain
from pipelines.plan import PlannedStep
from pipelines.profiles import read_profile
from pipelines.spec import names_in
from pipelines.store import Store
from pipelines.view import seconds, without_fingerprint


def act(arguments: Namespace) -> int:
    """Say what a run would do."""
    profile = read_profile(arguments.cluster) if arguments.cluster else None
    made, storage = read_plan(arguments, profile=profile)
    stored = Store(storage).hits(s.fingerprint for s in made.steps.values() if s.fingerprint)
    state = {n: _prospect(s, stored, hashed=not arguments.no_hash) for n, s in made.steps.items()}
    foreseen = None if profile is None else estimated(made, storage, profile, state)
    if arguments.json:
        each = {} if foreseen is None else {n: {"estimate": plain(one)} for n, one in foreseen[0].items()}
        steps = {n: {**described(made, n), "state": state[n], **each.get(n, {})} for n in made.steps}
        all_of_it = {} if foreseen is None or profile is None else {"total": _sum(foreseen[1], profile)}
        return printed({"name": made.spec.name, "inputs": inputs_of(made), "steps": steps, **all_of_it})
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "operator", "method", "takes", "makes", "asks", "state", "fingerprint"):
        rows.add_column(column)
    for name, step in made.steps.items():
        method = step.method[0] if step.method else ""
        takes = ", ".join(dict.fromkeys(_taken(step.inputs)))
        rows.add_row(name, step.operator, method, takes, step.kind, _asks(step.resources), state[name],
                     step.fingerprint[:12] or "none")  # fmt: skip
    shown(rows)
    if foreseen is not None and profile is not None:
        print()
        shown(_estimates(foreseen[0], profile))
        print(_said(foreseen[1], profile))
        print()
    for line in without_fingerprint({n: described(made, n) for n in made.steps}):
        print(line)
    for name, artifact in made.inputs.items():
        print(f"input {name}: {artifact.uri} digest {artifact.digest[:12] or 'unknown'}")
    return 0


def _prospect(step: PlannedStep, stored: Collection[str], *, hashed: bool) -> str:
    if step.effect:
        return "runs (effect)"
    if not step.fingerprint and not hashed:  # a run hashes its inputs
        return "unknown"
    return "stored" if step.fingerprint in stored else "runs"


def _asks(resources: Resources) -> str:
    workers = f"{resources.workers} x " if resources.workers > 1 else ""
    gpus = f", {resources.gpus_per_worker:g} {resources.accelerator}" if resources.gpus else ""
    shared = f", {resources.strategy}" if resources.strategy != "single" else ""
    return f"{workers}{resources.cpus_per_worker:g} CPU{gpus}{shared}"


def _taken(inputs: Mapping[str, Any]) -> list[str]:
    return [n for r in inputs.values() for n in names_in(r)]


def _estimates(each: Mapping[str, Estimate], profile: Profile) -> Table:
    """What each step takes, as rows."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "state", "on", "memory", "of", "GPU", "of", "most of it", "time", "from", profile.currency):
        rows.add_column(column)
    for name, one in each.items():
        where = f"{one.nodes} x {one.room}" if one.room else ""
        most = sorted(one.footprint.items().items(), key=lambda i: -i[1])[:2] if one.footprint and one.room else []
        rows.add_row(
            name,
            one.state,
            where,
            *(_gib(n) for n in one.host),
            *(_gib(n) for n in one.device),
            ", ".join(f"{k} {_gib(n)}" for k, n in most),
            _span(one.seconds) if one.room else "",
            one.source,
            _money(one.cost) if one.room else "",
        )
    return rows


def _said(total: Total, profile: Profile) -> str:
    """What all steps take, in one line."""
    least = f", without {', '.join(total.unknown)}, of which nothing is known" if total.unknown else ""
    parts = f"steps {_money(total.steps)}, head {_money(total.head)}, idle {_money(total.idle)}"
    return f"total: {_span(total.seconds)}, {_money(total.cost)} {profile.currency} ({parts}){least}"


def _sum(total: Total, profile: Profile) -> dict[str, Any]:
    """The same as JSON."""
    return {**asdict(total), "cost": total.cost, "currency": profile.currency, "cluster": profile.name}


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size else ""


def _span(of: Range | None) -> str:
    if of is None:
        return "unknown"
    low, high = map(seconds, of)
    return low if low == high else f"{low} to {high}"


def _money(of: Range | None) -> str:
    if of is None:
        return "unknown"
    low, high = (f"{value:.2f}" for value in of)
    return low if low == high else f"{low} to {high}"
