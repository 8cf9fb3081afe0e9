"""Store -> what nobody refers to any more.

Everything is listed before the journals are read: what a run has begun to use by then is referred to. And a run writes
down every step's fingerprint before it looks for results. So results go first, and then the journals are read again:
who found one in time is in them, and it is put back. Whoever begins later finds none, and makes its own; before more
goes, the journals of those are read too.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import processes
from pipelines.ancestry import results
from pipelines.lineage import history, written
from pipelines.storage.base import MANIFEST, Entry, Storage, at_once, owner, remove
from pipelines.store import Result, Store, canonical

COMMIT_S = 3600  # how long after an artifact the result that names it may come
SILENT_S = 24 * 3600  # what a process of another machine has not touched for so long, it has left behind
BATCH = 16  # how much goes between two looks at who has begun meanwhile
OWN = {
    *("artifacts", "checkpoints", "leases", "ledgers", "locks", "packages", "quarantine", "results", "runs", "scratch"),
    "submissions",
}
"""Folders of the store that this file knows; JSON in any other one refers to what it names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """Something that can go.

    Attributes:
        kind: ``run``, ``result``, ``artifact``, ``checkpoint``, ``lease``, ``ledger``, ``quarantine``, ``package``, or
            ``copy`` and ``scratch`` for what lies on this machine.
        key: Where it is in the store; on this machine its path.
        size: In bytes.
        why: Why nobody misses it.
    """

    kind: str
    key: str
    size: int
    why: str


def garbage(store: Store, *, drop: Collection[str] = (), gone: Iterable[Result] = ()) -> list[Garbage]:
    """What can go, in the order in which it has to.

    Args:
        store: Where to look.
        drop: Runs whose journals, logs and measures go, and with them what only they refer to; not while they go on.
        gone: Results that count as if they were there.
    """
    storage, now = store.storage, time.time()
    copies = sorted(storage.copies.glob("artifacts/*")) if storage.copies else []  # before what they are copies of
    artifacts, checkpoints, quarantine = (
        _folders(storage.entries(folder)) for folder in ("artifacts", "checkpoints", "quarantine")
    )
    sizes = {e.key: e.size for e in storage.entries("results")}
    known = list({r.fingerprint: r for r in (*gone, *results(store))}.values())
    names = storage.folders("runs")
    began = dict(zip(names, at_once(lambda r: bool(storage.list(f"runs/{r}/journal")), names), strict=True))
    lives = {r for r in names if live(storage, r) is not None}
    # Where not even a claim lies, one may be about to.
    dead = {r for r in names if r not in lives and (began[r] or storage.list(f"runs/{r}/claims"))}
    ended = {r: "dropped" if r in drop else "never began" for r in dead if r in drop or not began[r]}
    said = {r: _journal(storage, r) for r in names if r not in ended}
    kept, used = _reached(known, set().union(_registered(storage), *said.values()))
    going_on = set().union(*(said[r] for r in lives if r in said))
    return [
        *_runs(storage, ended),
        *_results(known, kept, sizes),
        *_artifacts(artifacts, used, {r.digest for r in known}, now),
        *_checkpoints(checkpoints, used, going_on, {r.fingerprint for r in known}),
        *_leases(storage, now),
        *_ledgers(storage, now),
        *(Garbage(kind="quarantine", key=k, size=_size(e), why="damaged") for k, e in quarantine.items()),
        *_packages(storage.entries("packages"), used, now),
        *_copies(copies, artifacts),
        *_scratches(storage.scratches, now),
    ]


def sweep(store: Store, found: Iterable[Garbage], *, drop: Collection[str] = ()) -> list[Garbage]:
    """Delete what was found, save what somebody has begun to refer to meanwhile, and return what went.

    Args:
        store: Where.
        found: By `garbage`.
        drop: The same as there.
    """
    storage, found = store.storage, list(found)
    runs = [g for g in found if g.kind == "run" and live(storage, g.key.partition("/")[2]) is None]
    at_once(lambda g: storage.delete(g.key), runs)
    keys = [g.key for g in found if g.kind == "result"]
    taken = {k: data for k, data in zip(keys, at_once(storage.read, keys), strict=True) if data is not None}
    at_once(storage.delete, taken)
    gone = [Result(**json.loads(data)) for data in taken.values()]
    others = [g for g in found if g.kind not in ("run", "result")]
    batches = [others[i : i + BATCH] for i in range(0, len(others), BATCH)]
    seen: set[str] = set()
    went = {g.key for g in runs}
    for batch in batches or [[]]:
        new = {r for r in storage.folders("runs") if r not in seen and storage.list(f"runs/{r}/journal")}
        if new or not seen:
            seen |= new
            still = {g.key for g in garbage(store, drop=drop, gone=gone)}
            for key in taken.keys() - still:
                storage.put_if_absent(key, taken[key])
        goes = [g for g in batch if g.key in still]
        at_once(lambda g: _delete(storage, g), goes)
        went |= {g.key for g in goes}
    went |= taken.keys() & still
    return [g for g in found if g.key in went]


def _delete(storage: Storage, one: Garbage) -> None:
    if one.kind in ("copy", "scratch"):
        path = Path(one.key)
        path.unlink(missing_ok=True) if path.is_file() else remove(path)
    else:
        storage.delete(one.key)


def live(storage: Storage, run: str) -> Mapping[str, Any] | None:
    """The process that drives a run; one of another machine, if it seems to."""
    claims = storage.list(f"runs/{run}/claims")
    if not claims:
        return None
    claim: dict[str, Any] = json.loads(storage.read(claims[-1]) or b"{}")
    alive = processes.alive(claim)
    if alive is False:
        return None
    if any(f"/{len(claims):06}-" in k for k in storage.list(f"runs/{run}/journal")):
        states = [e.kind for e in history(storage, run) if e.kind in ("started", "serving", "finished")]
        if states[-1:] == ["finished"]:
            return None
    touched = max(e.modified for e in storage.entries(f"runs/{run}"))
    return claim if alive or touched > time.time() - SILENT_S else None


def _folders(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by the folder two levels down that they are in."""
    found: dict[str, list[Entry]] = {}
    for one in entries:
        found.setdefault("/".join(one.key.split("/")[:2]), []).append(one)
    return found


def _size(entries: Iterable[Entry]) -> int:
    return sum(e.size for e in entries)


def _journal(storage: Storage, run: str) -> set[str]:
    """Every digest and fingerprint that a run's journal names."""
    packs, segments = written(storage, run)
    found = at_once(storage.read, (*packs, *segments))
    return set().union(*(_digests(data or b"") for data in found))


def _registered(storage: Storage) -> set[str]:
    """Every digest that the registry, or what else keeps JSON in the store, names."""
    keys = [k for folder in storage.folders("") if folder not in OWN for k in storage.list(folder)]
    found = at_once(storage.read, [k for k in keys if k.endswith(".json")])
    return set().union(*(_digests(data or b"") for data in found))


def _digests(data: bytes) -> set[str]:
    return set(re.findall(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", data.decode(errors="replace")))


def _reached(known: Iterable[Result], named: set[str]) -> tuple[set[str], set[str]]:
    """The results that stay, by fingerprint, and every digest and fingerprint that they and `named` lead to.

    Where a digest is named and none of the results that have it is, each of them may be the one that is meant.
    """
    having: dict[str, list[Result]] = {}
    for one in known:
        having.setdefault(one.digest, []).append(one)
    prints = {r.fingerprint: r for r in known}
    kept: dict[str, Result] = {}
    makers: set[str] = set()  # digests of which a result that has them is named
    new = named
    while new:
        makers |= {prints[n].digest for n in new & prints.keys()}
        found = [prints[n] for n in new & prints.keys()]
        found += [r for n in new - makers for r in having.get(n, ())]
        kept |= {r.fingerprint: r for r in found}
        leads = (_digests(canonical([r.inputs, r.components.get("inputs")])) for r in found)
        new = {r.digest for r in found}.union(*leads) - named
        named |= new
    return set(kept), named


def _runs(storage: Storage, gone: Mapping[str, str]) -> Iterator[Garbage]:
    for run, why in gone.items():
        yield Garbage(kind="run", key=f"runs/{run}", size=_size(storage.entries(f"runs/{run}")), why=why)


def _results(known: Iterable[Result], kept: Collection[str], sizes: Mapping[str, int]) -> Iterator[Garbage]:
    for one in known:
        key = f"results/{one.fingerprint}.json"
        if one.fingerprint not in kept:
            yield Garbage(kind="result", key=key, size=sizes.get(key, 0), why=f"of step {one.step}, no run's")


def _artifacts(
    found: Mapping[str, list[Entry]], used: Collection[str], named: Collection[str], now: float
) -> Iterator[Garbage]:
    for key, entries in found.items():
        digest = key.partition("/")[2]
        if digest in used:
            continue
        whole = any(e.key == f"{key}/{MANIFEST}" for e in entries)
        age = now - max(e.modified for e in entries)
        if digest in named or age > (COMMIT_S if whole else SILENT_S):
            yield Garbage(kind="artifact", key=key, size=_size(entries), why="no run's" if whole else "never finished")


def _checkpoints(
    found: Mapping[str, list[Entry]], used: Collection[str], going_on: Collection[str], done: Collection[str]
) -> Iterator[Garbage]:
    for key, entries in found.items():
        fingerprint = key.partition("/")[2]
        if fingerprint not in going_on and (fingerprint in done or fingerprint not in used):
            why = "its step is done" if fingerprint in done else "no run's"
            yield Garbage(kind="checkpoint", key=key, size=_size(entries), why=why)


def _packages(found: Iterable[Entry], used: Collection[str], now: float) -> Iterator[Garbage]:
    """Code that was submitted, and that no run which is kept has had; its driver may not have begun yet."""
    for one in found:
        digest = one.key.partition("/")[2].removesuffix(".zip")
        if digest not in used and now - one.modified > SILENT_S:
            yield Garbage(kind="package", key=one.key, size=one.size, why="no run's")


def _leases(storage: Storage, now: float) -> Iterator[Garbage]:
    """Those that who held them cannot give back any more."""
    for one in storage.entries("leases"):
        alive = processes.alive(json.loads(storage.read(one.key) or b"{}"))
        if alive is False or (alive is None and now - one.modified > SILENT_S):
            yield Garbage(kind="lease", key=one.key, size=one.size, why="its process is gone")


def _ledgers(storage: Storage, now: float) -> Iterator[Garbage]:
    """Those of clusters on which nobody runs anything any more."""
    for one in storage.entries("ledgers"):
        if now - one.modified > SILENT_S:
            yield Garbage(kind="ledger", key=one.key, size=one.size, why="no run has entered anything for a day")


def _copies(found: Iterable[Path], artifacts: Collection[str]) -> Iterator[Garbage]:
    for path in found:
        if f"artifacts/{path.name}" not in artifacts:
            yield Garbage(kind="copy", key=str(path), size=_looked(path)[0], why="of what is not in the store")


def _scratches(folder: Path, now: float) -> Iterator[Garbage]:
    for path in sorted(folder.glob("*")):
        if processes.alive(owner(path.name)) is None:  # who was killed on this machine, `open_storage` clears up after
            size, touched = _looked(path)
            if now - touched > SILENT_S:
                yield Garbage(kind="scratch", key=str(path), size=size, why="its process is silent")


def _looked(path: Path) -> tuple[int, float]:
    """The bytes below a path of this machine and when the last of them was written; what goes meanwhile is left out."""
    size, touched = 0, 0.0
    below = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    for one in (path, *below):
        with contextlib.suppress(FileNotFoundError):
            stat = one.lstat()
            size += 0 if one.is_dir() else stat.st_size
            touched = max(touched, stat.st_mtime)
    return size, touched
