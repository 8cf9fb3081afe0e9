"""Documents with one thing wrong are caught, each by the rule that is there for it."""

import copy

import pytest
import yaml

from cluster.entrypoint import Entrypoint
from cluster.manifests.cluster_rules import CLUSTER_RULES
from cluster.manifests.job import Job, Served
from cluster.manifests.job_rules import ANY_RULES, JOB_RULES, SERVE_RULES, SERVICE_RULES
from cluster.manifests.launcher_rules import LAUNCHER_RULES
from cluster.manifests.pod_rules import POD_RULES
from cluster.manifests.pods import RUN
from cluster.manifests.rendering import documents
from cluster.manifests.rules import broken
from cluster.profile import Group, Head, Profile

GONE = object()
GPU = {"cpus": 12, "memory_gib": 48, "gpus": 1, "accelerator": "L4", "type": "g6.4xlarge"}
GROUPS = {
    "cpu": Group(cpus=16, memory_gib=64, max_nodes=4, type="m7i.4xlarge"),
    "gpu": Group(**GPU, max_nodes=4),
    "spot": Group(**GPU, max_nodes=8, market="spot", fallback="gpu"),
}
FIELDS = {
    "name": "research",
    "head": Head(cpus=4, memory_gib=16, type="m7i.xlarge"),
    "groups": GROUPS,
    "storage": "s3://bucket/lfm",
    "image": "registry.example.com/lfm:1",
    "shared": ("/nfs",),
    "environment": {"HF_HOME": "/nfs/hub"},
    "token": "file:~/.ray/auth_token",
}
JOB = Job(
    run="small-expert-1",
    words=Entrypoint(pipeline="own/small.yaml", run="small-expert-1", store="s3://bucket/lfm").words,
    package=f"s3://bucket/lfm/packages/{'0123456789abcdef' * 4}.zip",
    endpoint=Served(name="helper", inputs={"model": "lfm://small-expert-1/merged"}),
)


def sound():
    """A document of each kind in which nothing is wrong."""
    inside = Profile(**{**FIELDS, "place": "kuberay", "secrets": ("lfm-storage",), "token": "secret:ray"})
    outside = Profile(place="aws", region="eu-west-1", **FIELDS)
    return {**documents(inside), **documents(inside, JOB), **documents(outside, JOB)}


SOUND = sound()
HEAD, WORKERS = "spec.headGroupSpec", "spec.workerGroupSpecs"
SERVING = "spec.rayClusterConfig.headGroupSpec.template"
CPU, ON_DEMAND, SPOT = (f"{WORKERS}.{n}" for n in range(3))
START, TYPES = "head_start_ray_commands", "available_node_types"
LIMITS = "template.spec.containers.0.resources.limits"
NODES = "template.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
ENV = "template.spec.containers.0.env"

BAD = [
    # rule, kind, then what is changed: places with their values
    ("name", "RayCluster", {"metadata.name": "x" * 54}),
    ("name", "RayJob", {"metadata.name": "x" * 48}),
    ("name", "RayService", {"metadata.name": "Helper"}),
    ("group-names", "RayCluster", {f"{CPU}.groupName": "gpu", f"{CPU}.labels.ray.io/node-group": "gpu"}),
    ("autoscaler", "RayCluster", {"spec.enableInTreeAutoscaling": False}),
    ("autoscaler", "RayCluster", {"spec.autoscalerOptions.version": "v1"}),
    ("counts", "RayCluster", {f"{CPU}.minReplicas": GONE}),
    ("counts", "RayCluster", {f"{CPU}.minReplicas": 5}),
    ("counts", "RayCluster", {f"{CPU}.maxReplicas": 0}),
    ("counts", "RayCluster", {f"{CPU}.idleTimeoutSeconds": -1}),
    ("counts", "RayCluster", {f"{CPU}.suspend": True}),
    ("fallback", "RayCluster", {f"{SPOT}.template.metadata.annotations.learn-from-model/fallback": "none"}),
    ("fallback", "RayCluster", {f"{SPOT}.priority": 0}),
    ("fallback", "RayCluster", {f"{ON_DEMAND}.labels.ray.io/accelerator-type": "A100"}),
    ("gpus-last", "RayCluster", {f"{CPU}.priority": 0}),
    ("head-steps", "RayCluster", {f"{HEAD}.resources.CPU": "4"}),
    ("token", "RayCluster", {"spec.authOptions": GONE}),
    ("token", "RayCluster", {"spec.authOptions.mode": "disabled"}),
    ("token", "RayCluster", {"spec.rayVersion": "2.51.0"}),
    ("token", "RayCluster", {"spec.rayVersion": GONE}),
    ("token", "RayJob", {"spec.rayClusterSpec.authOptions": {"mode": "token", "enableK8sTokenAuth": True}}),
    ("upgrade", "RayCluster", {"spec.upgradeStrategy": GONE}),
    ("upgrade", "RayService", {"spec.upgradeStrategy.type": "Recreate"}),
    ("upgrade", "RayService", {"spec.upgradeStrategy.type": "NewClusterWithIncrementalUpgrade"}),
    ("upgrade", "RayJob", {"spec.rayClusterSpec.upgradeStrategy": {"type": "None"}}),
    ("head-store", "RayCluster", {"spec.gcsFaultToleranceOptions": {"backend": "rocksdb", "redisAddress": "redis"}}),
    ("head-store", "RayCluster", {"spec.gcsFaultToleranceOptions": {"storage": {"claimName": "gcs"}}}),
    ("queue", "RayJob", {"metadata.labels.kueue.x-k8s.io/queue-name": "gpus"}),
    ("labels", "RayJob", {"metadata.labels.team": "research and more"}),
    ("renewed", "RayService", {f"{SERVING}.metadata.annotations.{RUN}": "older"}),
    ("port", "RayService", {f"{SERVING}.spec.containers.0.ports.1.containerPort": 8000}),
    ("port", "RayService", {f"{SERVING}.spec.containers.0.ports": []}),
    ("image", "RayCluster", {f"{CPU}.template.spec.containers": []}),
    ("ray-start-labels", "RayCluster", {f"{CPU}.rayStartParams.labels": "a=b"}),
    ("resources-twice", "RayCluster", {f"{CPU}.rayStartParams.num-cpus": "16"}),
    ("resources", "RayCluster", {f"{CPU}.resources": GONE}),
    ("resources", "RayCluster", {f"{CPU}.{LIMITS}.memory": "65Gi"}),
    ("resources", "RayCluster", {f"{CPU}.resources.CPU": "17"}),
    ("labels", "RayCluster", {f"{CPU}.labels.team": "research and more"}),
    ("labels", "RayCluster", {f"{CPU}.labels.-team": "x"}),
    ("group-label", "RayCluster", {f"{CPU}.labels.ray.io/node-group": "other"}),
    ("market", "RayCluster", {f"{CPU}.labels.ray.io/market-type": GONE}),
    ("market", "RayCluster", {f"{HEAD}.labels.ray.io/market-type": "spot"}),
    ("on-demand-nodes", "RayCluster", {f"{HEAD}.template.spec.affinity": GONE}),
    ("on-demand-nodes", "RayCluster", {f"{HEAD}.template.spec.nodeSelector": {"cloud.google.com/gke-spot": "true"}}),
    ("on-demand-nodes", "RayCluster", {f"{HEAD}.template.spec.tolerations": [{"key": "cloud.google.com/gke-spot"}]}),
    ("on-demand-nodes", "RayCluster", {f"{HEAD}.{NODES}.0.matchExpressions.0.operator": "In"}),
    ("spot-nodes", "RayCluster", {f"{SPOT}.template.spec.affinity": GONE}),
    ("gpus", "RayCluster", {f"{ON_DEMAND}.{LIMITS}.nvidia.com/gpu": GONE}),
    ("gpus", "RayCluster", {f"{ON_DEMAND}.labels.ray.io/accelerator-type": GONE}),
    ("gpus", "RayCluster", {f"{ON_DEMAND}.template.spec.tolerations": GONE}),
    ("gpus", "RayCluster", {f"{CPU}.template.spec.tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}),
    ("restart-policy", "RayCluster", {f"{CPU}.template.spec.restartPolicy": "Always"}),
    ("grace", "RayCluster", {f"{SPOT}.template.spec.terminationGracePeriodSeconds": 90}),
    ("grace", "RayCluster", {f"{SPOT}.template.spec.terminationGracePeriodSeconds": GONE}),
    ("grace", "RayCluster", {f"{SPOT}.{ENV}": []}),
    ("undisturbed-head", "RayCluster", {f"{HEAD}.template.metadata": GONE}),
    ("variables", "RayCluster", {f"{CPU}.{ENV}.0": {"name": "HF_HOME", "value": "/twice"}}),
    ("variables", "RayCluster", {f"{CPU}.{ENV}.0": {"name": "a b", "value": "x"}}),
    ("variables", "RayCluster", {f"{HEAD}.{ENV}.0": {"name": "RAY_JOB_ALLOW_DRIVER_ON_WORKER_NODES", "value": "1"}}),
    ("variables", "RayCluster", {f"{HEAD}.{ENV}.0": {"name": "RAY_enable_autoscaler_v2", "value": "0"}}),
    ("secrets", "RayCluster", {f"{CPU}.{ENV}.0": {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}}),
    ("volumes", "RayCluster", {f"{CPU}.template.spec.volumes": []}),
    ("volumes", "RayCluster", {f"{CPU}.template.spec.containers.0.volumeMounts.0.mountPath": "/"}),
    ("entrypoint", "RayJob", {"spec.entrypoint": "python -m pipelines run small.yaml --store s3://bucket/lfm"}),
    ("entrypoint", "RayJob", {"spec.entrypoint": "python -m pipelines run small.yaml --as"}),
    ("driver", "RayJob", {"spec.entrypointNumCpus": 1}),
    ("end", "RayJob", {"spec.shutdownAfterJobFinishes": False}),
    ("end", "RayJob", {"spec.suspend": True, "spec.shutdownAfterJobFinishes": False}),
    ("end", "RayJob", {"spec.deletionStrategy": {"deletionRules": [{"policy": "DeleteCluster"}]}}),
    ("end", "RayJob", {"spec.ttlSecondsAfterFinished": -1}),
    ("retries", "RayJob", {"spec.backoffLimit": GONE}),
    ("retries", "RayJob", {"spec.submissionMode": "InteractiveMode"}),
    ("submission", "RayJob", {"spec.clusterSelector": {"ray.io/cluster": "x"}}),
    ("submission", "RayJob", {"spec.submissionMode": "SidecarMode", "spec.submitterConfig": {"backoffLimit": 1}}),
    ("deadlines", "RayJob", {"spec.activeDeadlineSeconds": 0}),
    ("package", "RayJob", {"spec.runtimeEnvYAML": "working_dir: ."}),
    ("package", "RayJob", {"spec.runtimeEnvYAML": "working_dir: s3://bucket/latest.zip"}),
    ("package", "RayJob", {"spec.runtimeEnvYAML": "env_vars: {A: b}"}),
    ("package", "RayJob", {"spec.runtimeEnvYAML": "just words"}),
    ("endpoints", "RayService", {"spec.serveConfigV2": "applications: []"}),
    ("endpoints", "RayService", {"spec.serveConfigV2": "applications: [{name: a, route_prefix: /}]"}),
    ("endpoints", "serve", {"applications.0.runtime_env.working_dir": "."}),
    ("endpoints", "serve", {"applications.1": {"name": "helper", "route_prefix": "/", "import_path": "a:b"}}),
    ("written-secrets", "RayJob", {"spec.entrypoint": "x --as a --store s3 --mlflow postgresql://me:word@db/runs"}),
    ("head", "launcher", {"head_node_type": "none"}),
    ("head", "launcher", {f"{TYPES}.head.max_workers": 1, "max_workers": 17}),
    ("head", "launcher", {f"{TYPES}.head.node_config.InstanceMarketOptions": {"MarketType": "spot"}}),
    ("machines", "launcher", {"max_workers": 3}),
    ("machines", "launcher", {f"{TYPES}.cpu.min_workers": GONE}),
    ("market", "launcher", {f"{TYPES}.cpu.node_config.InstanceMarketOptions": {"MarketType": "spot"}}),
    ("market", "launcher", {f"{TYPES}.cpu.labels": {}}),
    ("gpus", "launcher", {f"{TYPES}.gpu.labels.ray.io/accelerator-type": GONE}),
    ("resources", "launcher", {f"{TYPES}.gpu.resources.memory": GONE}),
    ("autoscaler", "launcher", {f"{START}.1": "RAY_AUTH_MODE=token ray start --head"}),
    ("token", "launcher", {f"{START}.1": "ray start --head"}),
    ("token", "launcher", {"file_mounts": {}}),
    ("grace", "launcher", {"worker_start_ray_commands.1": "RAY_AUTH_MODE=token ray start"}),
    ("explicit", "launcher", {"setup_commands": GONE}),
    ("explicit", "launcher", {"docker.image": ""}),
    ("secrets", "launcher", {f"{START}.0": "export AWS_SECRET_ACCESS_KEY=x"}),
]  # fmt: skip


def changed(document, changes):
    """A copy of a document with other values at some places."""
    made = copy.deepcopy(document)
    for path, value in changes.items():
        put(made, path, value)
    return made


def put(inside, path, value):
    """Set a value, or take it away, at a dotted path; of keys with dots the one that is there, or the last."""
    if isinstance(inside, list):
        key, _, rest = path.partition(".")
        if not rest:
            inside[int(key) :] = [value, *inside[int(key) + 1 :]]
        else:
            put(inside[int(key)], rest, value)
        return
    key = next((k for k in sorted(inside, key=len, reverse=True) if path == k or path.startswith(f"{k}.")), None)
    if key is not None and path != key:
        put(inside[key], path[len(key) + 1 :], value)
    elif value is GONE:
        del inside[path]
    else:
        inside[path] = value


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_document_breaks_no_rule(kind):
    assert not broken(SOUND[kind])


@pytest.mark.parametrize(("rule", "kind", "changes"), BAD)
def test_what_is_wrong_is_caught_by_its_rule(rule, kind, changes):
    bad = changed(SOUND[kind], changes)
    assert bad != SOUND[kind]
    found = broken(bad)
    assert rule in {f.rule for f in found}
    assert all(f.where and ", expected " in f.sentence for f in found if f.rule == rule), found


def test_every_rule_has_a_document_that_breaks_it():
    every = {*CLUSTER_RULES, *POD_RULES, *JOB_RULES, *SERVE_RULES, *SERVICE_RULES, *LAUNCHER_RULES, *ANY_RULES}
    assert every == {rule for rule, _, _ in BAD}


def test_a_secret_is_no_document():
    assert [f.rule for f in broken({"kind": "Secret", "stringData": {"auth_token": "x"}})] == ["written-secrets"]


def test_what_a_rule_finds_says_where():
    bad = changed(SOUND["RayJob"], {"spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy": "Always"})
    assert list(map(str, broken(bad))) == [
        "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy: 'Always', expected 'Never'"
    ]


def test_a_serve_config_is_read_inside_of_its_service():
    service = SOUND["RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["applications"][0]["import_path"] = "here"
    found = broken(changed(service, {"spec.serveConfigV2": yaml.safe_dump(config)}))
    assert [(f.rule, f.where) for f in found] == [("endpoints", "spec.serveConfigV2.applications.0.import_path")]
