"""Command line -> the store that it means, and the profile of a cluster."""

from argparse import Namespace

from cluster.profile import Profile
from pipelines.profiles import read_profile
from pipelines.storage.base import Storage
from pipelines.storage.opening import open_storage


def profile_in(arguments: Namespace) -> Profile | None:
    """The profile that ``--cluster`` names, if it does."""
    return read_profile(arguments.cluster) if getattr(arguments, "cluster", "") else None


def storage_in(arguments: Namespace) -> Storage:
    """Where the profile keeps artifacts and runs, where ``--cluster`` names one; else what ``--store`` says."""
    return storage_and_profile(arguments)[0]


def storage_and_profile(arguments: Namespace) -> tuple[Storage, Profile | None]:
    """Both, of a profile that is read once."""
    profile = profile_in(arguments)
    return open_storage(arguments.store if profile is None or not profile.storage else profile.storage), profile
