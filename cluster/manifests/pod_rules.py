"""What must hold of every group of pods in a document for Kubernetes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.manifests.finding import Rules, Said, at
from cluster.manifests.pods import DRAIN, GPU, SPOT_NODES, SPOT_TAINTS, UNDISTURBED
from cluster.profile import ACCELERATOR_LABEL, GROUP_LABEL, HEAD, MARKET_LABEL

LABEL_NAME = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
LABEL_KEY = rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{LABEL_NAME}"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
OURS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_enable_autoscaler_v2", "RAY_REDIS_ADDRESS",
        "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_JOB_ALLOW_DRIVER_ON_WORKER_NODES", "RAY_ADDRESS")  # fmt: skip
"""Variables that KubeRay or this project sets, or that would move the driver away from the head."""
SECRET_WORDS = {"SECRET", "TOKEN", "PASSWORD", "PASSWD", "CREDENTIALS", "KEY"}
"""Of a variable's name in words, the last of which says that its value is one."""


@dataclass(frozen=True, slots=True)
class Group:
    """The head's pods, or those of a worker group.

    Attributes:
        where: Its place in the document.
        name: What it is called; the head's is ``head``.
        spec: What the document says of it.
        cluster: The whole cluster.
    """

    where: str
    name: str
    spec: Mapping[str, Any]
    cluster: Mapping[str, Any]

    @property
    def head(self) -> bool:
        """Whether it is the head's."""
        return self.name == HEAD

    @property
    def pod(self) -> Mapping[str, Any]:
        """Its pods' specification."""
        return dict(at(self.spec, "template.spec", {}))

    @property
    def container(self) -> Mapping[str, Any]:
        """The container that Ray runs in, the first."""
        return dict(next(iter(self.pod.get("containers") or []), {}))

    @property
    def spot(self) -> bool:
        """Whether its nodes can be taken away."""
        return bool(at(self.spec, "labels", {}).get(MARKET_LABEL) == "spot")

    @property
    def gpus(self) -> int:
        """GPUs of each pod, as Ray knows them."""
        return int(at(self.spec, "resources", {}).get("GPU", 0))

    @property
    def variables(self) -> list[tuple[str, Any]]:
        """The container's variables in order."""
        return [(e.get("name", ""), e.get("value")) for e in self.container.get("env", [])]


def groups(where: str, cluster: Mapping[str, Any]) -> Iterator[Group]:
    """All groups of a cluster, the head first."""
    yield Group(f"{where}.headGroupSpec", HEAD, cluster.get("headGroupSpec") or {}, cluster)
    for number, spec in enumerate(cluster.get("workerGroupSpecs") or []):
        yield Group(f"{where}.workerGroupSpecs.{number}", spec.get("groupName", ""), spec, cluster)


def _image(group: Group) -> Said:
    if not group.container.get("image"):
        yield f"{group.where}.template", "no image, expected one for the first container"


def _ray_start_labels(group: Group) -> Said:
    if "labels" in at(group.spec, "rayStartParams", {}):
        yield f"{group.where}.rayStartParams.labels", "KubeRay takes none here, expected them beside, as labels"


def _resources_twice(group: Group) -> Said:
    twice = {"num-cpus", "num-gpus", "memory", "resources"} & {*at(group.spec, "rayStartParams", {})}
    if twice and group.spec.get("resources"):
        names = ", ".join(sorted(twice))
        yield f"{group.where}.rayStartParams", f"{names} beside resources, expected them in one place"


def _resources(group: Group) -> Said:
    """Autoscaling up from zero has nothing but these to go by."""
    there = group.spec.get("resources") or {}
    lacking = {"CPU", "memory"} - {*there}
    if lacking:
        yield f"{group.where}.resources", f"no {' and no '.join(sorted(lacking))}, expected what Ray may give there"
    limits, asked = (at(group.container, f"resources.{k}", {}) for k in ("limits", "requests"))
    if limits != asked or not {"cpu", "memory"} <= {*limits}:
        yield f"{group.where}.template", "limits that are not the requests, expected both alike, with cpu and memory"
    if not group.head and str(limits.get("cpu")) != there.get("CPU"):
        yield f"{group.where}.resources.CPU", f"{there.get('CPU')!r}, expected as many as its container gets"


def _labels(group: Group) -> Said:
    yield from bad_labels(f"{group.where}.labels", at(group.spec, "labels", {}))


def bad_labels(where: str, labels: Mapping[str, str]) -> Said:
    """Every label that Kubernetes would not take."""
    for key, value in labels.items():
        if not re.fullmatch(LABEL_KEY, str(key)) or not re.fullmatch(f"{LABEL_NAME}?", str(value)):
            yield where, f"{key!r}: {value!r}, expected what Kubernetes takes as a label"


def _group_label(group: Group) -> Said:
    if (said := at(group.spec, "labels", {}).get(GROUP_LABEL)) != group.name:
        yield f"{group.where}.labels", f"{GROUP_LABEL}={said!r}, expected {group.name!r}"


def _market(group: Group) -> Said:
    said = at(group.spec, "labels", {}).get(MARKET_LABEL)
    if said not in ("spot", "on-demand"):
        yield f"{group.where}.labels", f"{MARKET_LABEL}={said!r}, expected 'spot' or 'on-demand'"
    if group.head and said == "spot":
        yield f"{group.where}.labels", "a head on spot nodes, expected it on demand: the driver is there too"


def _affinity(group: Group) -> list[list[Mapping[str, Any]]]:
    path = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
    return [term.get("matchExpressions", []) for term in at(group.pod, path, [])]


def _on_demand_nodes(group: Group) -> Said:
    """What is on demand must not come to a node that can be taken away, whichever cloud it is of."""
    if group.spot:
        return
    terms = _affinity(group)
    for key, value in SPOT_NODES.items():
        kept_off = [
            any(e["key"] == key and e["operator"] == "NotIn" and value in e["values"] for e in t) for t in terms
        ]
        if not kept_off or not all(kept_off):
            yield f"{group.where}.template.spec.affinity", f"nodes with {key}={value}, expected none of these"
        if at(group.pod, "nodeSelector", {}).get(key) == value:
            yield f"{group.where}.template.spec.nodeSelector", f"{key}={value}, expected nodes that are on demand"
    taints = {t.get("key") for t in group.pod.get("tolerations", [])} & {*SPOT_TAINTS}
    if taints:
        yield f"{group.where}.template.spec.tolerations", f"{', '.join(sorted(taints))}, expected none of spot nodes"


def _spot_nodes(group: Group) -> Said:
    if not group.spot or group.pod.get("nodeSelector"):
        return
    terms = _affinity(group)
    if not terms or not all(any(e["operator"] == "In" and e["key"] in SPOT_NODES for e in t) for t in terms):
        yield f"{group.where}.template.spec", "no nodes named, expected spot ones by nodeSelector or affinity"


def _gpus(group: Group) -> Said:
    limit = int(at(group.container, "resources.limits", {}).get(GPU, 0))
    if limit != group.gpus and not (group.head and group.gpus == 0):
        yield f"{group.where}.resources.GPU", f"{group.gpus}, expected {limit}, which its container gets"
    kind = at(group.spec, "labels", {}).get(ACCELERATOR_LABEL)
    if bool(kind) != bool(limit):
        yield (
            f"{group.where}.labels",
            f"{ACCELERATOR_LABEL}={kind!r}, expected the GPU's kind where there is one, or none",
        )
    tolerated = any(t.get("key") == GPU for t in group.pod.get("tolerations", []))
    if tolerated != bool(limit):
        what = "does not tolerate" if limit else "tolerates"
        yield f"{group.where}.template.spec.tolerations", f"{what} {GPU}, expected that of groups with GPUs alone"


def _restart(group: Group) -> Said:
    """A node that comes back in its own place would not be the one that the autoscaler knows."""
    if (said := group.pod.get("restartPolicy")) != "Never":
        yield f"{group.where}.template.spec.restartPolicy", f"{said!r}, expected 'Never'"


def _grace(group: Group) -> Said:
    drain = float(dict(group.variables).get(DRAIN) or 0)
    grace = group.pod.get("terminationGracePeriodSeconds")
    if not drain:
        yield f"{group.where}.template", f"no {DRAIN}, expected seconds for work to come to an end"
    elif not isinstance(grace, int) or grace <= drain:
        yield f"{group.where}.template.spec.terminationGracePeriodSeconds", f"{grace}, expected more than {drain:g}"


def _undisturbed(group: Group) -> Said:
    said = at(group.spec, "template.metadata.annotations", {})
    for key, value in UNDISTURBED.items():
        if group.head and said.get(key) != value:
            yield f"{group.where}.template.metadata.annotations", f"no {key}, expected {value!r}: drivers run there"


def _variables(group: Group) -> Said:
    names = [name for name, _ in group.variables]
    where = f"{group.where}.template.env"
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield where, f"{name} twice, expected it once"
    for name in names:
        if not re.fullmatch(VARIABLE, name):
            yield where, f"{name!r}, expected a variable's name of letters, digits and '_'"
        if name in OURS:
            yield where, f"{name}, which is not for a profile to set, expected none. Take it out of 'environment'"


def _secrets(group: Group) -> Said:
    for name, value in group.variables:
        if secret(name) and value is not None:
            fix = "Put it into a Kubernetes secret and name that under 'secrets'"
            yield f"{group.where}.template.env", f"{name} with a value, expected no secret in a document. {fix}"


def secret(variable: str) -> bool:
    """Whether a variable's name says that its value is a secret."""
    return variable.upper().split("_")[-1] in SECRET_WORDS


def _volumes(group: Group) -> Said:
    known = {v.get("name") for v in group.pod.get("volumes", [])}
    mounts = group.container.get("volumeMounts", [])
    paths = [m.get("mountPath", "") for m in mounts]
    for mount in mounts:
        path = mount.get("mountPath", "")
        if mount.get("name") not in known:
            yield f"{group.where}.template", f"the mount {path!r} of no volume, expected one that is there"
        if not path.strip("/") or ":" in path or paths.count(path) > 1:
            yield f"{group.where}.template", f"a volume at {path!r}, expected folders below '/', each once"


POD_RULES: Rules = {
    "image": _image,
    "ray-start-labels": _ray_start_labels,
    "resources-twice": _resources_twice,
    "resources": _resources,
    "labels": _labels,
    "group-label": _group_label,
    "market": _market,
    "on-demand-nodes": _on_demand_nodes,
    "spot-nodes": _spot_nodes,
    "gpus": _gpus,
    "restart-policy": _restart,
    "grace": _grace,
    "undisturbed-head": _undisturbed,
    "variables": _variables,
    "secrets": _secrets,
    "volumes": _volumes,
}
