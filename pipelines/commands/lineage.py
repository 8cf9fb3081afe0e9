"""`lfm lineage`: print what an artifact came from."""

from argparse import Namespace
from dataclasses import asdict

from pipelines.commands._output import printed
from pipelines.lineage import Ancestor, ancestry, find_artifact
from pipelines.storage import open_storage
from pipelines.store import Store


def act(arguments: Namespace) -> int:
    """Print what an artifact came from."""
    store = Store(open_storage(arguments.store))
    found = ancestry(store, find_artifact(store, arguments.artifact))
    if arguments.json:
        return printed([asdict(a) for a in found])
    for one in found:
        print(ancestor_line(one))
    return 0


def ancestor_line(one: Ancestor) -> str:
    """One line of an ancestry: what it is, what made it, its digest."""
    role = f"{one.role}: " if one.role else ""
    origin = one.uri if one.made_by is None else f"{one.made_by.step} ({one.made_by.components['operator']})"
    method = one.made_by.components["method"] if one.made_by is not None else None
    return f"{'  ' * one.depth}{role}{one.kind} {origin}{f' {method[0]}' if method else ''} digest {one.digest}"
