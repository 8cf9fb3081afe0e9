"""Profile -> what Ray's own launcher (`ray up`) starts on virtual machines of a cloud."""

import shlex
from collections.abc import Mapping
from typing import Any

from cluster.manifests.kuberay import labels, priority
from cluster.manifests.pods import variables
from cluster.profile import GROUP_LABEL, HEAD, Group, Machine, Profile

TOKEN = "~/.ray/auth_token"
"""Where Ray looks for its token on a machine."""
DISKS = {"aws": 256, "gcp": 200}  # GiB: an image with torch in it, and a cache
BOOT_IMAGE = "projects/deeplearning-platform-release/global/images/family/common-cpu"
GPU_IMAGE = "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204-py310"
SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
BOTO = "python -c 'import googleapiclient' || python -m pip install google-api-python-client"


def launcher(profile: Profile) -> dict[str, Any]:
    """The launcher's document. Nothing is left to its defaults, which take spot machines and install another Ray."""
    types = {name: _type(profile, name, machine) for name, machine in profile.machines.items()}
    return {
        "cluster_name": profile.name,
        "max_workers": sum(g.max_nodes for g in profile.groups.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": max([g.idle_timeout_s for g in profile.groups.values()], default=60.0) / 60,
        "provider": _provider(profile),
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": profile.image,
            "container_name": "lfm",
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536", *(_mounted(path) for path in profile.shared)],
        },
        "available_node_types": types,
        "head_node_type": HEAD,
        "file_mounts": {TOKEN: profile.token.removeprefix("file:")},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [BOTO] if profile.place == "gcp" else [],
        "worker_setup_commands": [],
        "head_start_ray_commands": _start(profile, head=True),
        "worker_start_ray_commands": _start(profile, head=False),
    }


def _provider(profile: Profile) -> dict[str, Any]:
    made: dict[str, Any] = {"type": profile.place, "region": profile.region}
    if profile.zone:
        made["availability_zone"] = profile.zone
    if profile.place == "gcp":
        return {**made, "project_id": profile.project}
    return {**made, "cache_stopped_nodes": False}  # a machine that is stopped still pays for its disk


def _type(profile: Profile, name: str, machine: Machine) -> dict[str, Any]:
    computes = isinstance(machine, Group) or profile.head_computes
    there: dict[str, int] = {"CPU": int(machine.cpus) if computes else 0, "memory": int(machine.memory)}
    if machine.gpus and computes:
        there |= {"GPU": machine.gpus, f"accelerator_type:{machine.accelerator}": 1}
    made: dict[str, Any] = {
        "resources": there,
        "labels": labels(name, machine),
        "min_workers": 0,
        "max_workers": 0,
        "node_config": _NODES[profile.place](profile, name, machine),
    }
    if isinstance(machine, Group):
        made |= {"min_workers": machine.min_nodes, "max_workers": machine.max_nodes}
        made |= {"idle_timeout_s": machine.idle_timeout_s, "priority": priority(machine)}
    return made


def _on_aws(profile: Profile, name: str, machine: Machine) -> dict[str, Any]:
    disk = {"VolumeSize": int(machine.disk_gib) or DISKS["aws"], "VolumeType": "gp3"}
    made: dict[str, Any] = {
        "InstanceType": machine.type,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": GROUP_LABEL, "Value": name}]}],
    }
    if profile.service_account and name != HEAD:  # which has one that may start machines
        made["IamInstanceProfile"] = {"Name": profile.service_account}
    if _spot(machine):
        made["InstanceMarketOptions"] = {"MarketType": "spot"}
    return made


def _on_gcp(profile: Profile, name: str, machine: Machine) -> dict[str, Any]:
    image = GPU_IMAGE if machine.gpus else BOOT_IMAGE
    disk = {"diskSizeGb": int(machine.disk_gib) or DISKS["gcp"], "sourceImage": image}
    made: dict[str, Any] = {
        "machineType": machine.type,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
        "labels": {"node-group": name},
        "scheduling": {"provisioningModel": "SPOT" if _spot(machine) else "STANDARD"},
    }
    if _spot(machine):
        made["scheduling"] |= {"automaticRestart": False, "instanceTerminationAction": "DELETE"}
    if _spot(machine) or machine.gpus:  # neither can be moved to another host
        made["scheduling"] |= {"onHostMaintenance": "TERMINATE"}
    if profile.service_account and name != HEAD:
        made["serviceAccounts"] = [{"email": profile.service_account, "scopes": [*SCOPES]}]
    return made


_NODES = {"aws": _on_aws, "gcp": _on_gcp}


def _spot(machine: Machine) -> bool:
    return isinstance(machine, Group) and machine.market == "spot"


def _mounted(path: str) -> str:
    return f"-v {shlex.quote(f'{path}:{path}')}"


def _start(profile: Profile, *, head: bool) -> list[str]:
    """What starts Ray on a machine, with the variables that all of its processes take over."""
    own = {"RAY_enable_autoscaler_v2": "1"} if head else {}  # the first version ignores labels
    known: Mapping[str, str] = {**variables(profile), "RAY_AUTH_MODE": "token", **own}
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in known.items())
    begin = "ulimit -n 65536; ray start --object-manager-port=8076"
    where = (
        "--head --port=6379 --dashboard-host=0.0.0.0 --autoscaling-config=~/ray_bootstrap_config.yaml"
        if head
        else "--address=$RAY_HEAD_IP:6379"
    )
    return ["ray stop", f"export {exports}; {begin} {where}"]
