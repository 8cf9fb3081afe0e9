"""Profile -> documents for Kubernetes, as KubeRay 1.7 takes them: a RayCluster, a RayJob or a RayService."""

import math
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from cluster.manifests.job import Job, named, runtime_env
from cluster.manifests.pods import FALLBACK, RUN, STEPS, resources, template
from cluster.manifests.serve import serve_config
from cluster.profile import ACCELERATOR_LABEL, GROUP_LABEL, HEAD, MARKET_LABEL, Group, Machine, Profile

API = "ray.io/v1"
MAX_CLUSTER, MAX_JOB = 53, 47
"""How long names of a RayCluster may be, and those of a RayJob or RayService, of which a cluster's name is made."""
RETRIES = 2  # new clusters for a run whose cluster was lost; each goes on where the last one was
TTL_S = 300  # for which a finished cluster stays for those who want to look


def ray_cluster(profile: Profile) -> dict[str, Any]:
    """A cluster that stays until it is deleted."""
    spec = {**_cluster(profile), "upgradeStrategy": {"type": "None"}}  # nobody's steps end because a document changed
    return _document("RayCluster", profile, profile.name, {}, spec)


def ray_job(profile: Profile, job: Job) -> dict[str, Any]:
    """A cluster for one run, which goes when the run has ended; tried again, it goes on with the run."""
    environment = runtime_env(job.package, profile.pip)
    spec = {
        "entrypoint": shlex.join(job.words),
        **({"runtimeEnvYAML": yaml.safe_dump(environment, sort_keys=False, width=sys.maxsize)} if environment else {}),
        "metadata": {"run": job.run},
        "submissionMode": "HTTPMode",  # no pod besides, which a node could take with it
        "backoffLimit": RETRIES,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": TTL_S,
        "rayClusterSpec": _cluster(profile, job.run),
    }
    return _document("RayJob", profile, named(job.run, at_most=MAX_JOB), job.labels, spec)


def ray_service(profile: Profile, job: Job) -> dict[str, Any]:
    """A cluster that serves what a run has made; the one that serves what an older run made goes once this one answers.

    A config that names another run is deployed in place, the old replica first down; another cluster is not.
    """
    assert job.endpoint is not None, job
    config = serve_config(job.endpoint, store=profile.storage, environment=runtime_env(job.package, profile.pip))
    spec = {
        "serveConfigV2": yaml.safe_dump(config, sort_keys=False, width=sys.maxsize),
        "upgradeStrategy": {"type": "NewCluster"},
        "rayClusterConfig": _cluster(profile, job.run, job.endpoint.port),
    }
    return _document("RayService", profile, named(job.endpoint.name, at_most=MAX_JOB), job.labels, spec)


def _document(
    kind: str, profile: Profile, name: str, labels: Mapping[str, str], spec: Mapping[str, Any]
) -> dict[str, Any]:
    known = {"app.kubernetes.io/managed-by": "learn-from-model", **labels}
    metadata = {"name": name, "namespace": profile.namespace, "labels": known}
    return {"apiVersion": API, "kind": kind, "metadata": metadata, "spec": dict(spec)}


def _cluster(profile: Profile, run: str = "", port: int = 0) -> dict[str, Any]:
    kind, _, secret = profile.token.partition(":")
    computes = profile.head_computes
    about = {STEPS: str(computes).lower(), **({RUN: run} if run else {})}
    spec: dict[str, Any] = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", **({"secretName": secret} if kind == "secret" else {})},
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0"},
            "resources": resources(profile.head, computes=computes),
            "labels": labels(HEAD, profile.head),
            "template": template(profile, profile.head, annotations=about, port=port),
        },
    }
    if not profile.groups:
        return spec
    own = {"cpu": "500m", "memory": "1Gi"}
    spec["enableInTreeAutoscaling"] = True
    spec["autoscalerOptions"] = {"version": "v2", "resources": {"requests": dict(own), "limits": own}}
    spec["workerGroupSpecs"] = [_workers(profile, name, group) for name, group in profile.groups.items()]
    return spec


def _workers(profile: Profile, name: str, group: Group) -> dict[str, Any]:
    return {
        "groupName": name,
        "replicas": group.min_nodes,
        "minReplicas": group.min_nodes,
        "maxReplicas": group.max_nodes,
        "idleTimeoutSeconds": math.ceil(group.idle_timeout_s),
        "priority": priority(group),
        "rayStartParams": {},
        "resources": resources(group),
        "labels": labels(name, group),
        "template": template(profile, group, annotations={FALLBACK: group.fallback} if group.fallback else None),
    }


def labels(name: str, machine: Machine) -> dict[str, str]:
    """What Ray knows its nodes by: steps that ask for a kind of them are held against these."""
    market = machine.market if isinstance(machine, Group) else "on-demand"
    kind = {ACCELERATOR_LABEL: machine.accelerator} if machine.accelerator else {}
    return {**machine.labels, GROUP_LABEL: name, MARKET_LABEL: market, **kind}


def priority(group: Group) -> int:
    """Which of several groups that fit equally is asked first: cheap ones, and GPUs last of all.

    One that had none to give comes after all others for a while, whatever its priority: so its fallback stands in.
    """
    return 2 * (not group.gpus) + (group.market == "spot")
