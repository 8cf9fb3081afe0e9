"""`lfm lineage`: print what an artifact came from."""

from argparse import Namespace
from dataclasses import asdict

from pipelines.ancestry import ancestor_line, ancestry, find_artifact, find_maker
from pipelines.commands._output import printed
from pipelines.storage.opening import open_storage
from pipelines.store import Store


def act(arguments: Namespace) -> int:
    """Print what an artifact came from."""
    store = Store(open_storage(arguments.store))
    found = ancestry(store, find_artifact(store, arguments.artifact), find_maker(store, arguments.artifact))
    if arguments.json:
        return printed([asdict(a) for a in found])
    for one in found:
        print(ancestor_line(one))
    return 0
