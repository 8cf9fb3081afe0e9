"""`lfm cluster down`: end what `lfm cluster up` has started, and nothing else."""

import time
from argparse import Namespace
from collections.abc import Callable

from cluster import launched
from cluster.machines import NotUp, down
from cluster.profile import Profile
from cluster.seen import NoAnswer
from pipelines.commands.clusters._places import WrongPlace, confirmed, looked
from pipelines.profiles import read_profile, records

LOOK_S = 5.0  # how often it is looked whether somebody still uses it


def act(arguments: Namespace) -> int:
    """End a cluster; one that is not up is none to end."""
    profile = read_profile(arguments.profile)
    match profile.place:
        case "local":
            return _ended(profile, arguments, lambda: down(profile.name, records()))
        case "aws" | "gcp":
            return _ended(profile, arguments, lambda: launched.down(profile))
        case "kuberay":
            fix = f"'lfm cluster render {arguments.profile} | kubectl delete -f -' ends it."
        case _:
            fix = "Who made that cluster ends it."
    raise WrongPlace("down", profile.place, fix)


def _ended(profile: Profile, arguments: Namespace, end: Callable[[], bool]) -> int:
    if not arguments.yes and not confirmed(f"end cluster {profile.name!r}{_busy(profile)}"):
        return 1
    if arguments.when_idle:
        _wait_until_idle(profile)
    print(f"cluster {profile.name} is down" if end() else f"cluster {profile.name} was not up")
    return 0


def _wait_until_idle(profile: Profile) -> None:
    """Until no job runs there and nothing was used for as long as the profile says."""
    try:
        while looked(profile)[1].idle_s < profile.idle_s:
            time.sleep(LOOK_S)
    except NotUp:
        return


def _busy(profile: Profile) -> str:
    """What else there is to know before one says yes."""
    try:
        _, now = looked(profile)
    except (NotUp, NoAnswer):
        return ""
    return f", on which {len(now.running)} jobs run" if now.running else ""
