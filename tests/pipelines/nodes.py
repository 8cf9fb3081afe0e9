"""A cluster of several nodes on this machine, in a process of its own, which has nothing of the tests' Ray.

Run as ``python -m tests.pipelines.nodes FOLDER``. It answers with the address, then reads lines of JSON and answers
each when it is done: ``["add", NAME, CPUS]`` with the node's number, ``["remove", NAME]`` as if it had lost its power,
``["clear"]`` (the same for all), ``["drain", NAME, SECONDS]`` (a notice that it will be taken away) and ``["restart"]``
(the head's control store, killed and started again).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.autoscaler import drain


class Nodes:
    """What starts and ends them, for a test."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.nodes", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address = self._answer()

    def __call__(self, *asked):
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)


def main(folder):
    os.environ.update(
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_gcs_storage="rocksdb",
        RAY_gcs_storage_path=str(folder / "gcs"),
    )
    out = os.dup(1)
    os.dup2(2, 1)  # what Ray prints is no answer

    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {}

    def ids():
        """The node's number by its name."""
        return {name: n["NodeID"] for n in made.global_state.node_table() if n["Alive"] for name in n["Resources"]}

    def act(what, name="", number=0):
        if what == "add":
            nodes[name] = made.add_node(num_cpus=number, resources={name: 1})
            return ids()[name]
        if what in ("remove", "clear"):
            for gone in [name] if name else list(nodes):
                made.remove_node(nodes.pop(gone), allow_graceful=False)
        if what == "drain":
            drain(made.address, ids()[name], number, os.environ)
        if what == "restart":
            made.head_node.kill_gcs_server()
            made.head_node.start_gcs_server()
        return what

    def answer(said):
        os.write(out, (json.dumps(said) + "\n").encode())

    answer(made.address)
    for line in sys.stdin:
        answer(act(*json.loads(line)))
    made.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
