"""A profile's cluster on this machine: a head and workers that outlive the command which starts them.

What was started is written down, in a file for each cluster: where its folder is and which process each node is. All of
them, and whatever these start, carry the folder's name as `cluster.home` has it: what does not is never ended.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster import processes
from cluster.connect import SETTINGS
from cluster.home import MARK, end, short_place
from cluster.manifests.kuberay import labels
from cluster.profile import HEAD, Machine, Profile
from cluster.tokens import authenticated, made_token
from lfm.errors import LfmError

PREFIX = "lfm-up-"
START_S = 600.0  # how long a node may take to come up: a machine that is busy takes minutes
LOOK_S = 0.2
LOOPBACK = "127.0.0.1"
UP = "ray_current_cluster"  # what Ray writes into a node's folder when that is up
STORE_SHARE, LEAST_STORE = 0.1, 80 << 20  # of a node's memory for Ray's objects, as artifacts never are among them


class NotUp(LfmError, LookupError):
    """A profile whose cluster is not up."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"cluster {self.name!r}: it is not up, expected it to be. Start it with lfm cluster up."


class HalfUp(NotUp):
    """The same where something of it lives, or may: its start was interrupted, or its head has died."""

    def __str__(self) -> str:
        return (
            f"cluster {self.name!r}: only a part of it has come up or is left, expected all of it. Go on with "
            "lfm cluster up, or end it with lfm cluster down."
        )


class OtherCluster(LfmError, RuntimeError):
    """A cluster of the profile's name that is not the profile's."""

    def __init__(self, name: str, what: str, fix: str) -> None:
        super().__init__(name, what, fix)
        self.name, self.what, self.fix = name, what, fix

    def __str__(self) -> str:
        return f"cluster {self.name!r}: {self.what}, expected this profile's on this machine. {self.fix}"


class NodeFailed(LfmError, RuntimeError):
    """A node that did not come up."""

    def __init__(self, cluster: str, node: str, said: str, log: str) -> None:
        super().__init__(cluster, node, said, log)
        self.cluster, self.node, self.said, self.log = cluster, node, said, log

    def __str__(self) -> str:
        return (
            f"cluster {self.cluster!r}: node {self.node!r} did not come up and said {self.said!r}, expected it to "
            f"live. Look into {self.log}; try again with lfm cluster up, or end the rest with lfm cluster down."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What was started.

    Attributes:
        digest: Of the profile.
        host: The machine.
        folder: Ray's; its name marks all processes.
        token: Where the token is.
        dashboard: Where it will answer.
        address: The head's, once it is up.
        nodes: The process of each node, by the node's name: ``head``, ``GROUP-NUMBER``.
    """

    name: str
    digest: str
    host: str
    folder: str
    token: str
    dashboard: str
    address: str = ""
    nodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def lives(self, node: str) -> bool:
        """Whether a node's process does."""
        return bool(processes.alive(self.nodes.get(node, {})))


def up(profile: Profile, records: Path) -> list[str]:
    """Bring a cluster up, or what is missing of it, and wait until all of it lives.

    Args:
        profile: Of `place` ``local``; each group has its `min_nodes`.
        records: The folder where it is written down what was started.

    Returns:
        The nodes that were started: none where all lived.

    Raises:
        OtherCluster: One of that name is up already, from another profile or on another machine.
        NodeFailed: A node did not come up.
    """
    with _locked(records, profile.name):
        found = _read(records, profile.name)
        if found is not None:
            _check_same(found, profile)
            if not found.lives(HEAD) or not found.address:  # what is left of it is of no use to a new head
                end(Path(found.folder))
                found = None
        if found is None:
            token = profile.token or made_token(records / f"{profile.name}.token")
            folder = tempfile.mkdtemp(prefix=PREFIX, dir=short_place())
            port = urlsplit(profile.dashboard).port or _free_port()
            found = Record(
                name=profile.name,
                digest=digest(profile),
                host=processes.host(),
                folder=folder,
                token=token,
                dashboard=f"http://{LOOPBACK}:{port}",
            )
        return _brought_up(profile, found, records)


def down(name: str, records: Path) -> bool:
    """End what was started for the cluster of that name, and nothing else; whether there was something.

    Raises:
        OtherCluster: It is another machine's.
    """
    with _locked(records, name):
        found = _read(records, name)
        if found is None:
            return False
        _check_here(found)
        end(Path(found.folder))
        _path(records, name).unlink()
        return True


def located(profile: Profile, records: Path) -> Profile:
    """The profile as one of a cluster that runs, with its address, its dashboard and where its token is.

    Raises:
        NotUp: It does not; `HalfUp` where something of it does.
        OtherCluster: One of that name runs, but it is not this one.
    """
    if profile.place != "local":
        return profile
    found = _read(records, profile.name)
    if found is None:
        raise NotUp(profile.name)
    _check_same(found, profile)
    if not found.address or not found.lives(HEAD):
        raise HalfUp(profile.name)
    return replace(profile, place="address", address=found.address, dashboard=found.dashboard, token=found.token)


def digest(profile: Profile) -> str:
    """What a profile's content is known by."""
    return hashlib.sha256(json.dumps(asdict(profile), sort_keys=True).encode()).hexdigest()


def _check_here(found: Record) -> None:
    if found.host != processes.host():
        raise OtherCluster(found.name, f"it is up on {found.host!r}", "Go there, or name this profile otherwise.")


def _check_same(found: Record, profile: Profile) -> None:
    _check_here(found)
    if found.digest != digest(profile):
        what = "it was started from another profile, or from this one before it changed"
        raise OtherCluster(profile.name, what, "End it with lfm cluster down, or name this profile otherwise.")


def _brought_up(profile: Profile, found: Record, records: Path) -> list[str]:
    """Start what does not live; each process is written down as soon as there is one."""
    environment = {
        **authenticated(os.environ, found.token),
        **SETTINGS,
        **profile.environment,
        MARK: found.folder,
        # A job's 'python' is this one.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }
    environment.pop("RAY_ADDRESS", None)
    _write(records, found)
    nodes = [n for n in _machines(profile) if not found.lives(n.name)]
    for node in sorted(nodes, key=lambda n: n.name != HEAD):
        process = _start(node, _where(profile, found, node), environment, Path(found.folder))
        found = replace(found, nodes={**found.nodes, node.name: processes.of(process.pid)})
        _write(records, found)
        if node.name == HEAD:
            (address,) = _waited_for(found, [HEAD])
            found = replace(found, address=address)
            _write(records, found)
    started = [n.name for n in nodes]
    _waited_for(found, started)
    return started


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    group: str
    machine: Machine
    cpus: int


def _machines(profile: Profile) -> Iterator[_Node]:
    yield _Node(HEAD, HEAD, profile.head, int(profile.head.cpus) if profile.head_computes else 0)
    for name, group in profile.groups.items():
        for number in range(1, group.min_nodes + 1):
            yield _Node(f"{name}-{number}", name, group, int(group.cpus))


def _where(profile: Profile, found: Record, node: _Node) -> list[str]:
    """What makes a node a head, or lets it find one."""
    if node.name != HEAD:
        return [f"--address={found.address}"]
    return [
        "--head",
        "--port=0",
        f"--ray-client-server-port={_free_port()}",
        "--include-dashboard=true",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={urlsplit(found.dashboard).port}",
    ]


def _words(node: _Node) -> list[str]:
    """What Ray is told of one machine."""
    machine = node.machine
    return [
        f"--node-name={node.name}",
        f"--num-cpus={node.cpus}",
        f"--num-gpus={machine.gpus}",
        f"--memory={int(machine.memory)}",
        f"--object-store-memory={max(LEAST_STORE, int(machine.memory * STORE_SHARE))}",
        f"--labels={','.join(f'{k}={v}' for k, v in sorted(labels(node.group, machine).items()))}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
    ]


def _start(node: _Node, where: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """A node's process, with a folder for its sockets: several that share one take each other's names."""
    home = _home(folder, node.name)
    home.mkdir(exist_ok=True)
    (home / UP).unlink(missing_ok=True)
    with (folder / f"{node.name}.log").open("wb") as log:
        words = ["start", *where, f"--temp-dir={home}", *_words(node), "--block"]
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *words],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives the command, and Ctrl-C is not for it
        )


def _home(folder: Path, node: str) -> Path:
    return folder / hashlib.sha256(node.encode()).hexdigest()[:4]  # short, as sockets' names have to be


def _waited_for(found: Record, nodes: Sequence[str]) -> list[str]:
    """The head's address as each node has written it down, which is the last that it does when it comes up."""
    until = time.monotonic() + START_S
    files = {n: _home(Path(found.folder), n) / UP for n in nodes}
    while not all(f.exists() and f.stat().st_size for f in files.values()):
        dead = next((n for n in nodes if not found.lives(n)), "")
        if dead or time.monotonic() > until:
            late = dead or next(n for n, f in files.items() if not f.exists())
            log = Path(found.folder) / f"{late}.log"
            raise NodeFailed(found.name, late, _complaint(log.read_text(errors="replace")), str(log))
        time.sleep(LOOK_S)
    return [f.read_text().strip() for f in files.values()]


def _complaint(log: str) -> str:
    """The first line of a log that tells of an error; its last one where none does."""
    lines = [line.strip() for line in log.split("\n") if line.strip()]
    errors = [line.partition(" -- ")[2].strip() for line in lines if re.search(r"\bERROR \S+ -- ", line)]
    return (errors or lines[::-1] or ["nothing"])[0]


def _free_port() -> int:
    with socket.socket() as place:
        place.bind((LOOPBACK, 0))
        return int(place.getsockname()[1])


@contextmanager
def _locked(records: Path, name: str) -> Iterator[None]:
    """One command at a time starts or ends the cluster of a name."""
    records.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (records / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _path(records: Path, name: str) -> Path:
    return records / f"{name}.json"


def _read(records: Path, name: str) -> Record | None:
    try:
        return Record(**json.loads(_path(records, name).read_bytes()))
    except FileNotFoundError:
        return None


def _write(records: Path, found: Record) -> None:
    new = records / f"{found.name}.json.new"
    new.write_text(json.dumps(asdict(found), indent=2))
    new.replace(_path(records, found.name))
