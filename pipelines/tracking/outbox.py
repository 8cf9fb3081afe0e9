"""Runs that MLflow has yet to hear of: where each is to be told, how much of it is, and whose turn it is to tell.

outbox/<run>.json   written before a run's first event, gone once MLflow has all of it
mirror.json         the process that is telling now; one at a time, because MLflow cannot create only what is absent
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster import processes
from lfm.errors import LfmError
from pipelines.credentials import check_uri
from pipelines.storage.base import Storage
from pipelines.store import canonical

OWN, NONE = "own", "none"
"""The store's own MLflow, a database beside its artifacts that moves with it; and no MLflow."""

SECRETS = (
    "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN; for a database what its own "
    "client reads, such as PGPASSWORD."
)

TURN = "mirror.json"
FOREIGN_TURN_S = 600.0  # after which a turn of another machine, of which nobody here can tell, counts as given up

Stamp = tuple[int, int]
"""How much there is of a run: its claims and its events."""


class NoTracking(LfmError, ValueError):
    """A place that MLflow cannot track runs at."""

    def __init__(self, uri: str, what: str) -> None:
        super().__init__(uri, what)
        self.uri, self.what = uri, what

    def __str__(self) -> str:
        return (
            f"MLflow at {self.uri!r}: {self.what}, expected http(s)://HOST, sqlite:///FILE or another database, 'own' "
            "(beside the artifacts of a store that is a folder) or 'none'. Set --mlflow or MLFLOW_TRACKING_URI."
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A run that MLflow is to be told of.

    Attributes:
        tracking: MLflow's tracking URI, or `OWN`.
        told: How much of the run MLflow has.
    """

    tracking: str
    told: Stamp = (0, 0)


def tracking(asked: str, storage: Storage) -> str:
    """Where runs are told: what was asked for, else the environment's MLflow, else the store's own.

    Returns:
        A tracking URI, `OWN` or `NONE`.

    Raises:
        NoTracking: MLflow cannot be there.
        SecretInUri: The URI holds a password, which would be written into the store.
    """
    folder = "://" not in storage.uri
    uri = asked or os.environ.get("MLFLOW_TRACKING_URI", "") or (OWN if folder else NONE)
    if uri == NONE or (uri == OWN and folder):
        return uri
    check_uri("MLflow", uri, SECRETS)
    if not re.match(r"(https?|(sqlite|postgresql|mysql|mssql)(\+\w+)?)://", uri):
        raise NoTracking(uri, "is no tracking server and no database")
    if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.partition(':///')[2]).absolute()}"  # whoever tells it later may stand elsewhere
    return uri


def resolved(where: str, storage: Storage) -> str:
    """The tracking URI of what `tracking` gave."""
    return f"sqlite:///{database(storage)}" if where == OWN else where


def database(storage: Storage) -> Path:
    """The file of the store's own MLflow."""
    return Path(storage.uri) / "mlflow.db"


def files(storage: Storage) -> Path:
    """The folder for what people log into the store's own MLflow besides."""
    return Path(storage.uri) / "mlflow"


def enter(storage: Storage, run: str, where: str) -> None:
    """Promise that MLflow will be told of the run."""
    _write(storage, run, Entry(where))


def entries(storage: Storage) -> dict[str, Entry]:
    """What is open, by run, oldest first."""
    found = {}
    for key in storage.list("outbox"):
        data = storage.read(key)
        if data is not None:
            entry = json.loads(data)
            run = key.removeprefix("outbox/").removesuffix(".json")
            found[run] = Entry(entry["tracking"], (entry["told"][0], entry["told"][1]))
    return found


def note(storage: Storage, run: str, entry: Entry) -> None:
    """Write down how much of an open run was told, unless it was closed meanwhile."""
    if storage.read(_key(run)) is not None:
        _write(storage, run, entry)


def close(storage: Storage, run: str) -> None:
    """Take the run off the list: all of it was told, or there is nothing to tell."""
    storage.delete(_key(run))


@contextmanager
def turn(storage: Storage) -> Iterator[bool]:
    """Whether this process alone tells MLflow now; nobody waits for it."""
    mine = canonical({**processes.this(), "since": time.time()})
    held = storage.read(TURN)
    if held is None:
        got = storage.put_if_absent(TURN, mine)
    else:
        got = _given_up(held) and storage.replace_if_match(TURN, mine, held)
    try:
        yield got
    finally:
        if got:
            storage.replace_if_match(TURN, b"{}", mine)


def _given_up(held: bytes) -> bool:
    holder = json.loads(held)
    lives = processes.alive(holder) if holder else False
    return time.time() - holder["since"] > FOREIGN_TURN_S if lives is None else not lives


def _key(run: str) -> str:
    return f"outbox/{run}.json"


def _write(storage: Storage, run: str, entry: Entry) -> None:
    data = canonical(asdict(entry))
    while not storage.put_if_absent(_key(run), data):
        old = storage.read(_key(run))
        if old == data or (old is not None and storage.replace_if_match(_key(run), data, old)):
            return
