"""`lfm cluster status`: nodes by group, running jobs, hours and cost so far."""

from argparse import Namespace
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.table import Table

from cluster.machines import HalfUp, NotUp
from cluster.profile import HEAD, Profile
from cluster.seen import Seen
from pipelines.commands._output import printed, shown
from pipelines.commands.clusters._places import WrongPlace, looked
from pipelines.profiles import read_profile


def act(arguments: Namespace) -> int:
    """Say what there is of a cluster; 1 where it is not up."""
    profile = read_profile(arguments.profile)
    if profile.place == "kuberay":
        fix = f"'kubectl get raycluster {profile.name} --namespace {profile.namespace}' says it."
        raise WrongPlace("status", profile.place, fix)
    try:
        there, now = looked(profile)
    except NotUp as error:
        return _not_up(error, arguments)
    if arguments.json:
        return printed(summary(there, now))
    _print(summary(there, now), now)
    return 0


def _not_up(error: NotUp, arguments: Namespace) -> int:
    if arguments.json:
        printed({"name": error.name, "up": False})
    else:
        left = ", but for what was started of it: lfm cluster up goes on, lfm cluster down ends it"
        print(f"cluster {error.name} is not up{left if isinstance(error, HalfUp) else ''}")
    return 1


def summary(profile: Profile, now: Seen) -> dict[str, Any]:
    """A cluster as JSON."""
    hours = now.hours()
    groups = {n: _group(profile, n, now, hours.get(n, 0.0)) for n in dict.fromkeys((HEAD, *profile.groups, *hours))}
    each = profile.machines
    return {
        "name": profile.name,
        "up": True,
        "address": profile.address,
        "dashboard": profile.dashboard,
        "groups": groups,
        "nodes": [asdict(n) for n in now.nodes],
        "jobs": [asdict(j) for j in now.running],
        "hours": sum(hours.values()),
        "cost": profile.cost(hours),
        "cost_per_hour": sum(each[n].price_per_hour * g["alive"] for n, g in groups.items() if n in each),
        "currency": profile.currency,
        "idle_s": now.idle_s,
    }


def _group(profile: Profile, name: str, now: Seen, hours: float) -> dict[str, Any]:
    nodes = [n for n in now.nodes if n.group == name]
    group = profile.groups.get(name)
    least, most = (group.min_nodes, group.max_nodes) if group is not None else (1, 1) if name == HEAD else (0, 0)
    alive = [n for n in nodes if n.alive]
    return {
        "alive": len(alive),
        "dead": len(nodes) - len(alive),
        "min": least,
        "max": most,
        "hours": hours,
        "cost": profile.cost({name: hours}),
    }


def _print(said: dict[str, Any], now: Seen) -> None:
    print(
        f"cluster {said['name']} at {said['address']}: {said['hours']:.2f} node-hours and "
        f"{said['cost']:.2f} {said['currency']} so far, {said['cost_per_hour']:.2f} {said['currency']} an hour now"
    )
    rows = Table("group", "alive", "dead", "min", "max", "hours", "cost", box=None, pad_edge=False, header_style="bold")
    for name, group in said["groups"].items():
        counts = (str(group[k]) for k in ("alive", "dead", "min", "max"))
        rows.add_row(name or "(none)", *counts, f"{group['hours']:.2f}", f"{group['cost']:.2f}")
    shown(rows)
    for job in now.running:
        print(f"job {job.id} since {datetime.fromtimestamp(job.began):%Y-%m-%d %H:%M}: {job.does}")
    if not now.running:
        print(f"no job runs; unused for {said['idle_s']:.0f} s")
