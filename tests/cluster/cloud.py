"""A cloud that is a file: its machines are lines in it, and what they are told is written down."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

FILE, ANSWER = "LFM_TEST_CLOUD", "LFM_TEST_ANSWER"
"""Variables that name the file of machines, and the one with what a head answers when it is asked what there is."""


def machines() -> dict[str, dict[str, Any]]:
    """Those that there are."""
    return json.loads(Path(os.environ[FILE]).read_text())


class Cloud(NodeProvider):
    """What Ray asks of a cloud."""

    def non_terminated_nodes(self, tag_filters):
        wanted = {**tag_filters, TAG_RAY_CLUSTER_NAME: self.cluster_name}.items()
        return [name for name, one in machines().items() if wanted <= one["tags"].items()]

    def is_running(self, node_id):
        return node_id in machines()

    def is_terminated(self, node_id):
        return node_id not in machines()

    def node_tags(self, node_id):
        return machines()[node_id]["tags"]

    def external_ip(self, node_id):
        return "127.0.0.1"

    internal_ip = external_ip

    def create_node(self, node_config, tags, count):
        there = machines()
        for _ in range(count):
            new = {"tags": {**tags, TAG_RAY_CLUSTER_NAME: self.cluster_name}, "config": node_config, "told": []}
            there[f"machine-{len(there)}"] = new
        self._write(there)

    def set_node_tags(self, node_id, tags):
        there = machines()
        there[node_id]["tags"] |= tags
        self._write(there)

    def terminate_node(self, node_id):
        there = machines()
        del there[node_id]
        self._write(there)

    def get_command_runner(self, log_prefix, node_id, auth_config, cluster_name, process_runner, use_internal_ip,
                           docker_config=None):  # fmt: skip
        return _Runner(self, node_id)

    def told(self, node_id, what):
        there = machines()
        there[node_id]["told"].append(what)
        self._write(there)

    @staticmethod
    def _write(there):
        Path(os.environ[FILE]).write_text(json.dumps(there))


class _Runner(CommandRunnerInterface):
    def __init__(self, cloud, node):
        self.cloud, self.node = cloud, node

    def run(self, cmd=None, timeout=120, exit_on_fail=False, port_forward=None, with_output=False,
            environment_variables=None, run_env="auto", ssh_options_override_ssh_key="",
            shutdown_after_run=False):  # fmt: skip
        self.cloud.told(self.node, cmd)
        if "python -c" in cmd:
            sys.stdout.write(Path(os.environ[ANSWER]).read_text())
        return b""

    def run_rsync_up(self, source, target, options=None):
        self.cloud.told(self.node, f"copy {target}")

    def run_rsync_down(self, source, target, options=None):
        self.cloud.told(self.node, f"fetch {source}")

    def remote_shell_command_str(self):
        return "ssh"

    def run_init(self, *, as_head, file_mounts, sync_run_yet):
        return False
