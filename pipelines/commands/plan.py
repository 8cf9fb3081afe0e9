"""`lfm plan`: say what a run would do."""

import math
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.table import Table

from cluster.profile import Profile
from operators.resources import Resources
from pipelines.beginning import described, inputs_of
from pipelines.commands._output import printed, shown
from pipelines.commands._planned import Foreseen, capacity_at, estimated, prospects, read_plan, repetitions
from pipelines.estimates import Estimate, Range, Total, binary, plain
from pipelines.plan import Plan
from pipelines.profiles import read_profile
from pipelines.searches import Repetition
from pipelines.spec import names_in
from pipelines.trial_estimates import TrialsEstimate, repetition_plain
from pipelines.view import seconds, without_fingerprint


def act(arguments: Namespace) -> int:
    """Say what a run would do."""
    profile = read_profile(arguments.cluster) if arguments.cluster else None
    made, storage = read_plan(arguments, profile=profile)
    state = prospects(made, storage, hashed=not arguments.no_hash)
    foreseen = None if profile is None else estimated(made, storage, profile, state)
    if foreseen is None:
        again = repetitions(made, state, partial(capacity_at, arguments.address))
    else:
        again = {n: one.repetition for n, one in foreseen.searches.items()}
    if arguments.json:
        return printed({"name": made.spec.name, "inputs": inputs_of(made), **_json(made, state, again, foreseen)})
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "operator", "method", "takes", "makes", "asks", "state", "fingerprint"):
        rows.add_column(column)
    for name, step in made.steps.items():
        method = step.method[0] if step.method else ""
        takes = ", ".join(dict.fromkeys(_taken(step.inputs)))
        rows.add_row(name, step.operator, method, takes, step.kind, _asks(step.resources), state[name],
                     step.fingerprint[:12] or "none")  # fmt: skip
    shown(rows)
    if foreseen is not None:
        print()
        shown(_estimates(foreseen.steps, foreseen.profile))
        print(_said(foreseen.total, foreseen.profile))
        print()
    for name, one in again.items():
        estimate = [] if foreseen is None else [_trials(foreseen.searches[name], foreseen.profile)]
        print(f"search {name}:", "\n  ".join([*_repeated(one), *estimate]))
    for line in without_fingerprint({n: described(made, n) for n in made.steps}):
        print(line)
    for name, artifact in made.inputs.items():
        print(f"input {name}: {artifact.uri} digest {artifact.digest[:12] or 'unknown'}")
    return 0


def _json(
    made: Plan, state: Mapping[str, str], again: Mapping[str, Repetition], foreseen: Foreseen | None
) -> dict[str, Any]:
    """Each step, with what is foreseen of it, and all together."""
    known = {} if foreseen is None else foreseen.json
    steps = {n: {**described(made, n), "state": state[n]} for n in made.steps}
    for name, said in known.get("steps", {}).items():
        steps[name]["estimate"] = said
    for name, one in again.items():
        trial = {} if foreseen is None else {"estimate": plain(foreseen.searches[name].each)}
        steps[name]["trials"] = {**repetition_plain(one), **trial}
    return {"steps": steps, **({"total": known["total"]} if known else {})}


def _asks(resources: Resources) -> str:
    workers = f"{resources.spoken} x " if resources.most > 1 else ""
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
        numbers = f"{one.nodes}" if one.fewest == one.nodes else f"{one.fewest} to {one.nodes}"
        where = f"{numbers} x {one.room}" if one.room else ""
        most = sorted(one.footprint.items().items(), key=lambda i: -i[1])[:2] if one.footprint and one.room else []
        rows.add_row(
            name,
            one.state,
            where,
            *((binary(n) if n else "-" for n in one.host) if one.room else ("", "")),  # "-": nobody knows
            *(binary(n) if n else "" for n in one.device),
            ", ".join(f"{k} {binary(n)}" for k, n in most),
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


def _repeated(one: Repetition) -> list[str]:
    """How many trials a search makes, and of what."""
    limit = f" within {seconds(one.max_s)}" if math.isfinite(one.max_s) else ""
    early = ", some of which are ended early" if one.early else ""
    share = f", all with the same {', '.join(one.shared)}" if one.shared else ""
    times = ", ".join(f"{most} x {name}" for name, most in one.times.items() if most)
    makes = f"make at the most {times}" if times else "make nothing"
    return [f"{one.trials} trials, {one.at_once} at once{limit}{early}{share}", f"{makes}, besides the steps above"]


def _trials(found: TrialsEstimate, profile: Profile) -> str:
    """What one of them takes, and all."""
    each, every = found.each, found.together
    if each.seconds is None:
        return f"how long {', '.join(found.unknown)} take, nobody knows"
    sizes = ((each.host[0], "memory"), (each.device[0], "a GPU"))
    memory = "".join(f", {binary(size)} of {what}" for size, what in sizes if size)
    least = f", without {', '.join(found.unknown)}, of which nothing is known" if found.unknown else ""
    return (
        f"each {_span(each.seconds)}, {_money(each.cost)} {profile.currency}{memory}; "
        f"together {_span(every.seconds)}, {_money(every.cost)} {profile.currency}{least}"
    )


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
