"""`lfm cluster up`: start what a profile describes."""

from argparse import Namespace

from cluster import launched
from cluster.machines import located, up
from cluster.profile import Profile
from pipelines.commands._output import printed
from pipelines.commands.clusters._places import WrongPlace
from pipelines.interrupts import INTERRUPTED
from pipelines.profiles import read_profile, records


def act(arguments: Namespace) -> int:
    """Start a cluster, or what is missing of one; where all lives it only says where."""
    profile = read_profile(arguments.profile)
    match profile.place:
        case "local":
            return _local(profile, arguments)
        case "aws" | "gcp":
            return _launched(profile, arguments)
        case "kuberay":
            fix = f"'lfm cluster render {arguments.profile} | kubectl apply -f -' starts it."
        case _:
            fix = "Who made that cluster starts it; lfm cluster status looks at it."
    raise WrongPlace("up", profile.place, fix)


def _local(profile: Profile, arguments: Namespace) -> int:
    try:
        started = up(profile, records())
    except KeyboardInterrupt:
        name, file = profile.name, arguments.profile
        print(f"cluster {name} is not up yet: lfm cluster up {file} goes on, lfm cluster down {file} ends it.")
        return INTERRUPTED
    there = located(profile, records())
    if arguments.json:
        return printed({"name": there.name, "address": there.address, "dashboard": there.dashboard, "started": started})
    print(f"cluster {there.name} is up at {there.address}, its dashboard at {there.dashboard}")
    print(f"started {', '.join(started)}" if started else "all of it was up already")
    print(
        f"run on it: lfm submit PIPELINE --cluster {arguments.profile} (lfm run does it from here, and ends with you)"
    )
    print(f"end it:    lfm cluster down {arguments.profile}")
    return 0


def _launched(profile: Profile, arguments: Namespace) -> int:
    launched.up(profile)
    if arguments.json:
        return printed({"name": profile.name})
    print(f"cluster {profile.name} is up: its head costs {profile.head.price_per_hour:g} {profile.currency} an hour")
    print(f"end it: lfm cluster down {arguments.profile} (with --when-idle once nobody uses it; Ray never ends a head)")
    return 0
