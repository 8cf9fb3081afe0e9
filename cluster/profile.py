"""What a profile is: where a pipeline runs, on which machines, at what price."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from cluster.capacity import Capacity, Node
from lfm.errors import FieldError
from lfm.method import FIELDS

Place = Literal["local", "address", "kuberay", "aws", "gcp"]
PLACES: tuple[Place, ...] = get_args(Place)
CLOUDS: tuple[Place, ...] = ("aws", "gcp")
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Of every process that computes: torch asks the system for pages of 2 MiB, which cost less to get than 512."""
GIB = 1 << 30
IDLE_S = 60.0
HEAD = "head"
"""What the head's node group is called everywhere; no group of a profile may be."""
GROUP_LABEL, MARKET_LABEL = "ray.io/node-group", "ray.io/market-type"
"""The labels of Ray that say of a node to which group it belongs, and whether it may be taken away."""
ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""The one that says what its GPUs are."""
STORES = "s3://BUCKET/PREFIX, or a folder below 'shared', which every machine sees"
"""What all machines can read and write."""
NAME = r"[a-z]([a-z0-9-]*[a-z0-9])?"
MAX_NAME = 40  # what KubeRay puts behind a cluster's name has to fit into 63 characters too


class ProfileError(FieldError):
    """A field of a profile that no cluster could have."""


class _Checked:
    __slots__ = ()
    __pydantic_config__ = FIELDS  # a dataclass would take an annotation for a field

    def require(self, holds: bool, field: str, allowed: str) -> None:
        """Raise `ProfileError` unless `holds`."""
        if not holds:
            raise ProfileError(type(self).__name__.lower(), field, getattr(self, field), allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine(_Checked):
    """One machine.

    Attributes:
        cpus: CPUs that Ray may give to steps.
        memory_gib: Host memory for them, in GiB.
        gpus: GPUs.
        accelerator: What Ray calls these, such as ``H100``; empty without any.
        gpu_memory_gib: Memory of each, in GiB; 0 where it is not known.
        tflops: What each device (a GPU; without one, all CPUs together) computes in practice, in 10^12 operations a
            second, of which a plan estimates times; 0 where it is not known.
        price_per_hour: Of the whole machine, in the currency of `Profile.currency`.
        type: What the cloud calls such a machine (``p5.4xlarge``); only ``aws`` and ``gcp`` ask for it.
        disk_gib: Disk for the container or the machine, in GiB; 0 takes what it comes with.
        labels: Labels of its nodes in Ray, by which steps can ask for them.
        node_selector: Labels of Kubernetes nodes to which its pods are bound.
    """

    cpus: float
    memory_gib: float
    gpus: int = 0
    accelerator: str = ""
    gpu_memory_gib: float = 0.0
    tflops: float = 0.0
    price_per_hour: float = 0.0
    type: str = ""
    disk_gib: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.require(self.cpus > 0, "cpus", "cpus > 0")
        self.require(self.memory_gib > 0, "memory_gib", "GiB, memory_gib > 0")
        self.require(self.gpus >= 0, "gpus", "gpus >= 0")
        self.require(bool(self.accelerator) == (self.gpus > 0), "accelerator", "a name such as 'H100' if gpus > 0")
        for name in ("gpu_memory_gib", "tflops", "price_per_hour", "disk_gib"):
            self.require(getattr(self, name) >= 0, name, f"{name} >= 0")
        own = {k for k in self.labels if not k.startswith("ray.io/")}
        self.require(own == {*self.labels}, "labels", "names outside of 'ray.io/', which Ray gives itself")

    @property
    def memory(self) -> float:
        """Host memory in bytes."""
        return self.memory_gib * GIB

    def node(self, group: str = "") -> Node:
        """What Ray has to give there."""
        kinds = frozenset({self.accelerator} - {""})
        return Node(cpus=self.cpus, gpus=float(self.gpus), memory=self.memory, accelerators=kinds, group=group)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head(Machine):
    """The machine on which head and drivers run; it is on demand and always there.

    Attributes:
        steps: Whether steps may compute there too; without, they get machines of the groups alone.
    """

    steps: bool = False

    def __post_init__(self) -> None:
        Machine.__post_init__(self)
        self.require(not (self.gpus and not self.steps), "gpus", "0, or steps: true, without which nobody uses them")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group(Machine):
    """Machines of one kind, of which there are more or fewer.

    Attributes:
        min_nodes: How many are there even if nobody needs one.
        max_nodes: The most.
        market: ``on-demand``, or ``spot`` for such as can be taken away at any time.
        fallback: The on-demand group that stands in for a ``spot`` one when it has none to give.
        idle_timeout_s: Seconds after which one that nobody uses goes.
    """

    min_nodes: int = 0
    max_nodes: int = 1
    market: Literal["on-demand", "spot"] = "on-demand"
    fallback: str = ""
    idle_timeout_s: float = IDLE_S

    def __post_init__(self) -> None:
        Machine.__post_init__(self)
        self.require(self.max_nodes >= 1, "max_nodes", "max_nodes >= 1")
        self.require(0 <= self.min_nodes <= self.max_nodes, "min_nodes", f"0 to {self.max_nodes}, its max_nodes")
        self.require(self.idle_timeout_s > 0, "idle_timeout_s", "seconds, idle_timeout_s > 0")
        self.require(not self.fallback or self.market == "spot", "fallback", "none, or market: spot")


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile(_Checked):
    """Where a pipeline runs.

    Attributes:
        name: Of the cluster.
        place: ``local`` (processes on this machine), ``address`` (a cluster that runs), ``kuberay`` (Kubernetes), or
            ``aws`` and ``gcp`` (virtual machines that Ray's own launcher starts).
        head: The head's machine.
        groups: All other machines, by the name of their group.
        storage: Where artifacts and runs are kept: what ``--store`` takes.
        mlflow: Where MLflow keeps runs: what ``--mlflow`` takes.
        shared: Folders that every machine sees under the same path, such as an NFS mount.
        address: Of ``place: address``, the cluster's in Ray's words (``ray-head:6379``).
        dashboard: Where Ray's dashboard answers, which takes jobs (``http://ray-head:8265``).
        image: The container that everything runs in; it holds Ray, this project and what it needs.
        pip: Packages that are installed on top, as pip takes them.
        environment: Variables of every process. No secrets: everybody who may see a job may read them.
        secrets: Names of Kubernetes secrets whose entries become variables.
        token: Where Ray's token is: ``env:NAME``, ``file:PATH`` or, in Kubernetes, ``secret:NAME``; never itself.
        namespace: Of Kubernetes.
        service_account: Who the machines are to others: a service account of Kubernetes, or of GCP an account's e-mail
            and of AWS an instance profile, for all but the head, which has the launcher's.
        region: Of a cloud.
        zone: The same.
        project: Of ``gcp``.
        drain_s: Seconds that a machine has between the word that it goes and its end, for checkpoints.
        currency: Of all prices.
    """

    name: str
    place: Place
    head: Head
    groups: Mapping[str, Group] = field(default_factory=dict)
    storage: str = ""
    mlflow: str = ""
    shared: tuple[str, ...] = ()
    address: str = ""
    dashboard: str = ""
    image: str = ""
    pip: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    token: str = ""
    namespace: str = "default"
    service_account: str = ""
    region: str = ""
    zone: str = ""
    project: str = ""
    drain_s: float = 90.0
    currency: str = "USD"

    def __post_init__(self) -> None:
        allowed = f"at most {MAX_NAME} small letters, digits and '-', a letter first, no '-' last"
        self.require(bool(re.fullmatch(NAME, self.name)) and len(self.name) <= MAX_NAME, "name", allowed)
        wrong = [n for n in self.groups if not re.fullmatch(NAME, n) or len(n) > MAX_NAME or n == HEAD]
        self.require(not wrong, "groups", f"names of {allowed}, and none called {HEAD!r}")
        self.require(self.drain_s >= 10, "drain_s", "seconds, drain_s >= 10")
        self.require(all(p.startswith("/") for p in self.shared), "shared", "absolute paths")
        self._check_fallbacks()
        self._check_place()
        self._check_token()

    def _check_fallbacks(self) -> None:
        for name, group in self.groups.items():
            other = self.groups.get(group.fallback)
            if group.fallback and (other is None or other.market == "spot"):
                on_demand = sorted(n for n, g in self.groups.items() if g.market == "on-demand")
                known = f"an on-demand group: {', '.join(on_demand) or 'there is none'}"
                raise ProfileError("profile", f"groups.{name}.fallback", group.fallback, known)

    def _check_place(self) -> None:
        self.require(self.place != "address" or bool(self.address), "address", "where the cluster is, for its place")
        self.require(self.place == "address" or not self.address, "address", "none, or place: address")
        self.require(self.place in CLOUDS or not (self.region or self.zone), "region", "none, or place: aws or gcp")
        self.require(self.place not in CLOUDS or bool(self.region), "region", f"the region, for place: {self.place}")
        self.require((self.place == "gcp") == bool(self.project), "project", "the project's id for place: gcp alone")
        if self.place in CLOUDS:
            for name, machine in self.machines.items():
                if not machine.type:
                    raise ProfileError("profile", f"{part_of(name)}.type", "", f"what {self.place} calls the machine")

    def _check_token(self) -> None:
        kinds = {"env": r"[A-Za-z_]\w*", "file": r".+", "secret": NAME}
        kind, _, where = self.token.partition(":")
        known = kind in kinds and bool(re.fullmatch(kinds[kind], where))
        if self.token and not known:  # it may be the token itself
            said = "env:NAME, file:PATH or secret:NAME, which say where it is"
            raise ProfileError("profile", "token", "...", said)
        self.require(
            kind != "secret" or self.place == "kuberay", "token", "env:NAME or file:PATH outside of Kubernetes"
        )

    @property
    def machines(self) -> dict[str, Machine]:
        """All kinds of machines by the name of their group, the head first."""
        return {HEAD: self.head, **self.groups}

    @property
    def most_nodes(self) -> int:
        """How many machines there can be, the head among them."""
        return 1 + sum(g.max_nodes for g in self.groups.values())

    @property
    def head_computes(self) -> bool:
        """Whether steps may compute on the head: where it says so, or is all there is."""
        return self.head.steps or not self.groups

    @property
    def idle_s(self) -> float:
        """Seconds after which a cluster that nobody uses is idle: those of its most patient group."""
        return max((g.idle_timeout_s for g in self.groups.values()), default=IDLE_S)

    @property
    def grows(self) -> bool:
        """Whether somebody brings the machines that are asked for: nobody does where all are processes of one."""
        return self.place != "local"

    def capacity(self) -> Capacity:
        """What there is for steps when every group is as large as it may become."""
        nodes = [self.head.node(HEAD)] if self.head_computes else []
        for name, group in self.groups.items():
            nodes += [group.node(name)] * (group.max_nodes if self.grows else group.min_nodes)
        return Capacity.of(nodes)

    def readable(self, uri: str) -> bool:
        """Whether every machine can read what lies at a location: a path, or a URI."""
        if self.most_nodes == 1:
            return True
        scheme, found, rest = uri.partition("://")
        if not found or scheme == "file":
            path = rest if found else uri
            return any(path == s or path.startswith(f"{s.rstrip('/')}/") for s in self.shared)
        if scheme.startswith("sqlite"):  # sqlite:////nfs/runs.db has three slashes before an absolute path
            return self.readable(rest.removeprefix("/")) if rest.startswith("//") else False
        host = re.split(r"[:/?#]", rest.rpartition("@")[2])[0]
        return host not in ("localhost", "127.0.0.1", "::1", "[", "0.0.0.0")

    def cost(self, hours: Mapping[str, float]) -> float:
        """What some node-hours cost, by group, the head's too; what belongs to no group has no price."""
        each = self.machines
        return math.fsum(each[name].price_per_hour * spent for name, spent in hours.items() if name in each)


def part_of(group: str) -> str:
    """Where a profile says what the machines of a group are."""
    return group if group == HEAD else f"groups.{group}"
