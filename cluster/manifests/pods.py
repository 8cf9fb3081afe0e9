"""Machine -> a pod's template: where it may run, what it gets, and how it ends."""

import math
from collections.abc import Mapping
from typing import Any

from cluster.profile import GIB, HUGE_PAGES, Group, Head, Machine, Profile

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""For so many seconds a node that was told to go lets its work come to an end."""
GRACE_S = 30  # what Ray's own processes may take to end after that
GPU = "nvidia.com/gpu"
SPOT_NODES = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""How the clouds label nodes that can be taken away at any time."""
SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
UNDISTURBED = {"karpenter.sh/do-not-disrupt": "true", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
"""What keeps those who tidy up nodes from moving a pod."""
FALLBACK, STEPS, RUN = (f"learn-from-model/{name}" for name in ("fallback", "steps", "run"))
"""Annotations: the group that stands in for a spot one, whether steps may compute on the head, and whose run it is."""
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}


def template(
    profile: Profile, machine: Machine, *, annotations: Mapping[str, str] | None = None, port: int = 0
) -> dict[str, Any]:
    """The pod of one machine; of a head that serves, `port` is where."""
    spot = isinstance(machine, Group) and machine.market == "spot"
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(profile.drain_s) + GRACE_S,
        "containers": [_container(profile, machine)],
    }
    if profile.service_account:
        spec["serviceAccountName"] = profile.service_account
    if machine.node_selector:
        spec["nodeSelector"] = dict(machine.node_selector)
    if not spot or not machine.node_selector:  # whoever names spot nodes knows them better
        spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": _nodes(spot=spot)}}
    if isinstance(machine, Head):
        ports = {**PORTS, **({"serve": port} if port else {})}
        spec["containers"][0]["ports"] = [{"name": n, "containerPort": p} for n, p in ports.items()]
    taints = [*(SPOT_TAINTS if spot else ()), *((GPU,) if machine.gpus else ())]
    if taints:
        spec["tolerations"] = [{"key": t, "operator": "Exists", "effect": "NoSchedule"} for t in taints]
    if profile.shared:
        spec["volumes"] = [
            {"name": f"shared-{n}", "hostPath": {"path": p, "type": "Directory"}} for n, p in enumerate(profile.shared)
        ]
    said = {**({} if spot else UNDISTURBED), **(annotations or {})}
    return {**({"metadata": {"annotations": said}} if said else {}), "spec": spec}


def resources(machine: Machine, *, computes: bool = True) -> dict[str, str]:
    """What Ray has to give there, which it must know of groups that have no node yet."""
    if not computes:
        return {"CPU": "0", "memory": str(int(machine.memory))}
    kinds = {"GPU": str(machine.gpus), f"accelerator_type:{machine.accelerator}": "1"} if machine.gpus else {}
    return {"CPU": str(int(machine.cpus)), "memory": str(int(machine.memory)), **kinds}


def _container(profile: Profile, machine: Machine) -> dict[str, Any]:
    asked = {"cpu": str(int(machine.cpus)), "memory": quantity(machine.memory_gib)}
    if machine.disk_gib:
        asked["ephemeral-storage"] = quantity(machine.disk_gib)
    if machine.gpus:
        asked[GPU] = str(machine.gpus)
    made: dict[str, Any] = {
        "name": "ray-head" if isinstance(machine, Head) else "ray-worker",
        "image": profile.image,
        "resources": {"requests": dict(asked), "limits": asked},
        "env": [{"name": k, "value": v} for k, v in variables(profile).items()],
    }
    if profile.secrets:
        made["envFrom"] = [{"secretRef": {"name": s}} for s in profile.secrets]
    if profile.shared:
        made["volumeMounts"] = [{"name": f"shared-{n}", "mountPath": p} for n, p in enumerate(profile.shared)]
    return made


def variables(profile: Profile) -> dict[str, str]:
    """Variables of every process of Ray: the profile's, then what makes nodes end in order."""
    return {"RAY_USAGE_STATS_ENABLED": "0", **HUGE_PAGES, **profile.environment, DRAIN: f"{profile.drain_s:g}"}


def quantity(gib: float) -> str:
    """GiB as Kubernetes writes them, in whole bytes."""
    return f"{int(gib)}Gi" if gib == int(gib) else str(int(gib * GIB))


def _nodes(*, spot: bool) -> dict[str, Any]:
    """Nodes of any cloud that can be taken away, or those of none: a node matches where one of the terms does."""
    if spot:
        terms = [[{"key": k, "operator": "In", "values": [v]}] for k, v in SPOT_NODES.items()]
    else:
        terms = [[{"key": k, "operator": "NotIn", "values": [v]} for k, v in SPOT_NODES.items()]]
    return {"nodeSelectorTerms": [{"matchExpressions": t} for t in terms]}
