"""`lfm gc`: delete what nobody refers to."""

from argparse import Namespace
from dataclasses import asdict

from rich.table import Table

from lfm.errors import LfmError
from pipelines.commands._output import printed, shown
from pipelines.garbage import garbage, live, sweep
from pipelines.lineage import RunIsLive, find_run, runs, trials
from pipelines.storage.base import Storage
from pipelines.storage.opening import open_storage
from pipelines.store import Store


class BadCount(LfmError, ValueError):
    """A number of runs below 0."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return f"--keep-last: {self.value}, expected a number of runs, 0 or more."


def act(arguments: Namespace) -> int:
    """Delete what nobody refers to, or say what that is."""
    store = Store(open_storage(arguments.store))
    drop = _dropped(arguments, store.storage)
    found = garbage(store, drop=drop)
    if not arguments.dry_run:
        found = sweep(store, found, drop=drop)
    total = sum(g.size for g in found)
    if arguments.json:
        return printed({"deleted": not arguments.dry_run, "bytes": total, "garbage": [asdict(g) for g in found]})
    if found:
        rows = Table("what", "where", "why", box=None, pad_edge=False, header_style="bold")
        rows.add_column("size", justify="right")
        for one in found:
            rows.add_row(one.kind, one.key, one.why, size(one.size))
        shown(rows)
    print(f"{len(found)} things, {size(total)} {'would go' if arguments.dry_run else 'deleted'}")
    return 0


def _dropped(arguments: Namespace, storage: Storage) -> set[str]:
    """The runs to drop, with their trials."""
    own = _chosen(arguments, storage)
    return own | {trial for run in own for trial in trials(storage, run)}


def _chosen(arguments: Namespace, storage: Storage) -> set[str]:
    """Those that were named, and all but the last ones that do not go on."""
    named = {find_run(storage, r) for r in arguments.runs}
    for run in named:
        claim = live(storage, run)
        if claim is not None:
            raise RunIsLive(run, claim["host"], claim["pid"])
    if arguments.keep_last is None:
        return named
    if arguments.keep_last < 0:
        raise BadCount(arguments.keep_last)
    known = runs(storage)
    old = known[: max(0, len(known) - arguments.keep_last)]
    return named | {r for r in old if live(storage, r) is None}


def size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if unit != "B" else f"{count} B"
