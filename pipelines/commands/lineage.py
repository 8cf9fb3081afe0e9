"""`lfm lineage`: print what an artifact came from."""

from argparse import Namespace
from dataclasses import asdict

from pipelines.ancestry import Ancestor, ancestry, find_artifact, find_maker
from pipelines.commands._output import printed
from pipelines.storage import open_storage
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


def ancestor_line(one: Ancestor) -> str:
    """One line of an ancestry: what it is, what made it, its digest."""
    role = f"{one.role}: " if one.role else ""
    return f"{'  ' * one.depth}{role}{one.kind} {_origin(one)} digest {one.digest}"


def _origin(one: Ancestor) -> str:
    if one.made_by is None:
        return one.uri or "of a step that the store has forgotten"
    method = one.made_by.components["method"]
    return f"{one.made_by.step} ({one.made_by.components['operator']}){f' {method[0]}' if method else ''}"
