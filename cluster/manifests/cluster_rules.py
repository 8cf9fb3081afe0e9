"""What must hold of a whole cluster in a document for Kubernetes, beside what its schema says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.manifests.finding import Rules, Said, at, whole
from cluster.manifests.kuberay import MAX_CLUSTER, MAX_JOB
from cluster.manifests.pod_rules import Group, bad_labels, groups
from cluster.manifests.pods import FALLBACK, STEPS
from cluster.profile import ACCELERATOR_LABEL, HEAD

OLDEST_TOKEN, OLDEST_DELEGATED = (2, 52), (2, 55)
"""The first versions of Ray with tokens, and with those of Kubernetes."""
QUEUE, ELASTIC = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/elastic-job"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster in a document.

    Attributes:
        kind: Of the document: ``RayCluster``, or what makes one.
        where: Its place in the document.
        spec: What is said of it.
        document: The whole document.
    """

    kind: str
    where: str
    spec: Mapping[str, Any]
    document: Mapping[str, Any]

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups, the head first."""
        return tuple(groups(self.where, self.spec))

    @property
    def workers(self) -> tuple[Group, ...]:
        """All groups but the head."""
        return self.groups[1:]


def _name(cluster: Cluster) -> Said:
    limit = MAX_CLUSTER if cluster.kind == "RayCluster" else MAX_JOB
    name = str(at(cluster.document, "metadata.name", ""))
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > limit:
        yield "metadata.name", f"{name!r}, expected at most {limit} small letters, digits and '-', a letter first"


def _document_labels(cluster: Cluster) -> Said:
    yield from bad_labels("metadata.labels", at(cluster.document, "metadata.labels", {}))


def _group_names(cluster: Cluster) -> Said:
    names = [g.name for g in cluster.workers]
    for group in cluster.workers:
        if names.count(group.name) > 1 or group.name == HEAD or not group.name:
            yield f"{group.where}.groupName", f"{group.name!r}, expected a name of its own, and not {HEAD!r}"


def _autoscaler(cluster: Cluster) -> Said:
    if not cluster.workers:
        return
    if cluster.spec.get("enableInTreeAutoscaling") is not True:
        yield f"{cluster.where}.enableInTreeAutoscaling", "not on, expected true: groups come and go"
    version = at(cluster.spec, "autoscalerOptions.version")
    if version != "v2":
        yield f"{cluster.where}.autoscalerOptions.version", f"{version!r}, expected 'v2': the first ignores labels"


def _counts(cluster: Cluster) -> Said:
    for group in cluster.workers:
        least, now, most = (group.spec.get(k) for k in ("minReplicas", "replicas", "maxReplicas"))
        if not (whole(least) and whole(most) and whole(now) and least <= now <= most and most >= 1):
            what = f"minReplicas={least!r}, replicas={now!r}, maxReplicas={most!r}"
            yield group.where, f"{what}, expected all three, in this order"
        if not whole(group.spec.get("idleTimeoutSeconds")):
            yield f"{group.where}.idleTimeoutSeconds", "none, expected after how many seconds an idle node goes"
        if group.spec.get("suspend"):
            yield f"{group.where}.suspend", "true, expected false: an autoscaler suspends no group"


def _fallback(cluster: Cluster) -> Said:
    """A spot group is asked before the one that stands in for it, which holds all that it holds."""
    known = {g.name: g for g in cluster.workers}
    for group in cluster.workers:
        name = at(group.spec, "template.metadata.annotations", {}).get(FALLBACK)
        if name is None:
            continue
        other, where = known.get(name), f"{group.where}.template.metadata.annotations"
        if other is None or other.spot or not group.spot:
            yield where, f"{FALLBACK}={name!r}, expected an on-demand group for a spot one"
        elif group.spec.get("priority", 0) <= other.spec.get("priority", 0):
            yield f"{group.where}.priority", f"{group.spec.get('priority', 0)}, expected more than that of {name!r}"
        elif not _holds(other, group):
            yield where, f"{FALLBACK}={name!r}, expected a group with the same accelerator and no less of anything"


def _holds(other: Group, group: Group) -> bool:
    mine, there = (at(g.spec, "resources", {}) for g in (group, other))
    alike = [at(g.spec, "labels", {}).get(ACCELERATOR_LABEL) for g in (group, other)]
    return alike[0] == alike[1] and all(float(there.get(k, 0)) >= float(v) for k, v in mine.items())


def _gpus_last(cluster: Cluster) -> Said:
    """Steps without a GPU must not bring up nodes that have some while others could hold them."""
    plain = [g.spec.get("priority", 0) for g in cluster.workers if not g.gpus]
    for group in cluster.workers:
        if group.gpus and plain and group.spec.get("priority", 0) >= min(plain):
            yield f"{group.where}.priority", f"{group.spec.get('priority', 0)}, expected less than groups without GPUs"


def _head_steps(cluster: Cluster) -> Said:
    head = cluster.groups[0]
    given = at(head.spec, "resources", {}).get("CPU", at(head.spec, "rayStartParams", {}).get("num-cpus"))
    allowed = at(head.spec, "template.metadata.annotations", {}).get(STEPS) == "true"
    if given != "0" and not allowed:
        yield f"{head.where}.resources.CPU", f"{given!r}, expected '0': no step may take the head from the driver"


def _token(cluster: Cluster) -> Said:
    said, where = cluster.spec.get("authOptions") or {}, f"{cluster.where}.authOptions"
    if said.get("mode") != "token":
        yield f"{where}.mode", f"{said.get('mode')!r}, expected 'token'"
    delegated = said.get("enableK8sTokenAuth")
    version, oldest = str(cluster.spec.get("rayVersion", "")), OLDEST_DELEGATED if delegated else OLDEST_TOKEN
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or tuple(map(int, numbers.groups())) < oldest:
        yield f"{cluster.where}.rayVersion", f"{version!r}, expected {'.'.join(map(str, oldest))} or newer for a token"
    if delegated and (said.get("secretName") or cluster.kind != "RayCluster"):
        what = "beside a secret, or of a RayJob or RayService"
        yield f"{where}.enableK8sTokenAuth", f"true {what}, expected a RayCluster alone"


def _upgrade(cluster: Cluster) -> Said:
    """Only what nobody else makes may say how it is upgraded, and it has to."""
    allowed = {
        "RayCluster": ("Recreate", "None"),
        "RayService": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
    }.get(cluster.kind, ())
    said = at(cluster.document, "spec.upgradeStrategy.type")
    if allowed and said not in allowed:
        yield "spec.upgradeStrategy.type", f"{said!r}, expected {' or '.join(allowed)}"
    if said == "NewClusterWithIncrementalUpgrade":
        needed = {"stepSizePercent", "intervalSeconds", "gatewayClassName"}
        if needed - {*at(cluster.document, "spec.upgradeStrategy.clusterUpgradeOptions", {})}:
            yield "spec.upgradeStrategy", f"{said} alone, expected it with {', '.join(sorted(needed))}"
    if cluster.kind != "RayCluster" and "upgradeStrategy" in cluster.spec:
        yield f"{cluster.where}.upgradeStrategy", f"one inside of a {cluster.kind}, expected none"


def _head_store(cluster: Cluster) -> Said:
    """What the head keeps across its end needs a gate of KubeRay that is off, or a Redis that nobody named."""
    said, where = cluster.spec.get("gcsFaultToleranceOptions"), f"{cluster.where}.gcsFaultToleranceOptions"
    if said is None:
        return
    if said.get("backend") == "rocksdb":
        redis = [k for k in said if k.startswith("redis") or k == "externalStorageNamespace"]
        also = f" with {', '.join(sorted(redis))}" if redis else ""
        yield where, f"rocksdb{also}, expected none: KubeRay's gate for it is off"
    elif "storage" in said:
        yield f"{where}.storage", "with redis, expected it with rocksdb alone"


def _queue(cluster: Cluster) -> Said:
    said = {**at(cluster.document, "metadata.labels", {}), **at(cluster.document, "metadata.annotations", {})}
    if QUEUE in said and cluster.spec.get("enableInTreeAutoscaling") and said.get(ELASTIC) != "true":
        yield "metadata.labels", f"{QUEUE} on what scales, expected the annotation {ELASTIC}: 'true' beside it"


CLUSTER_RULES: Rules = {
    "name": _name,
    "labels": _document_labels,
    "group-names": _group_names,
    "autoscaler": _autoscaler,
    "counts": _counts,
    "fallback": _fallback,
    "gpus-last": _gpus_last,
    "head-steps": _head_steps,
    "token": _token,
    "upgrade": _upgrade,
    "head-store": _head_store,
    "queue": _queue,
}
