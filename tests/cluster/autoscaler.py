"""Ray's real autoscaler on this machine, with processes that stand for the machines it brings."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cluster.connect import SETTINGS
from cluster.home import home, marked
from cluster.manifests.kuberay import labels, priority
from cluster.profile import HEAD, Machine, Profile

HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
START_S = 600.0


@contextmanager
def autoscaling(profile: Profile) -> Iterator[tuple[str, dict[str, str]]]:
    """A head whose autoscaler brings a profile's groups: its address, and the environment of what connects to it.

    All of it ends with the block, and with this process: `cluster.home` sees to that.
    """
    environment = {**os.environ, **SETTINGS, "RAY_AUTH_MODE": "disabled"}
    with home() as folder:
        with socket.socket() as place:  # what stands for machines has to be told before there is a head
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        address = f"{_own_address()}:{port}"
        file = folder / "autoscaler.yaml"
        file.write_text(yaml.safe_dump(_configuration(profile, address)))
        words = ["--head", "--block", f"--port={port}", f"--temp-dir={folder}", f"--autoscaling-config={file}",
                 "--num-cpus=0", "--num-gpus=0", "--object-store-memory=100000000", "--min-worker-port=0",
                 "--max-worker-port=0", "--dashboard-agent-listen-port=0", "--include-dashboard=false",
                 f"--ray-client-server-port={_free_port()}", f"--labels={_said(HEAD, profile.head)}"]  # fmt: skip
        started = {
            **environment,
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        with marked(folder), (folder / "head.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *words],
                env={**started, "LFM_CLUSTER": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_for(process, folder)
            yield address, environment
        finally:
            process.kill()
            process.wait()


def drain(address: str, node: str, seconds: int, environment: Mapping[str, str]) -> None:
    """Give the notice that a node will be taken away in so many seconds, as its cloud does."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}", f"--node-id={node}"]
    words += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=asked to"]
    words += [f"--deadline-remaining-seconds={seconds}"]
    subprocess.run(words, env=dict(environment), check=True, stdout=subprocess.DEVNULL)


def _configuration(profile: Profile, address: str) -> dict[str, Any]:
    """What the autoscaler is told; every field is there, because Ray brings no defaults for this provider."""
    types = {"ray.head.default": {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}}}
    for name, group in profile.groups.items():
        types[name] = {
            "resources": {"CPU": int(group.cpus), "GPU": group.gpus, "object_store_memory": 100_000_000},
            "labels": labels(name, group),
            "priority": priority(group),
            "min_workers": group.min_nodes,
            "max_workers": group.max_nodes,
            "idle_timeout_s": group.idle_timeout_s,
            "node_config": {},
        }
    return {
        "cluster_name": profile.name,
        "max_workers": sum(g.max_nodes for g in profile.groups.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": profile.idle_s / 60,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": address,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def _said(name: str, machine: Machine) -> str:
    return ",".join(f"{k}={v}" for k, v in labels(name, machine).items())


def _wait_for(process: subprocess.Popen[bytes], folder: Path) -> None:
    until = time.monotonic() + START_S
    while not (folder / "ray_current_cluster").exists():
        assert process.poll() is None, (folder / "head.log").read_text()
        assert time.monotonic() < until, "the head did not come up"
        time.sleep(0.1)


def _own_address() -> str:
    """How Ray calls this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("8.8.8.8", 80))  # nothing is sent
            return str(asked.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])
