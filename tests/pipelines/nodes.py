"""A cluster of several nodes on this machine, in a process of its own, which has nothing of the tests' Ray.

Run as ``python -m tests.pipelines.nodes FOLDER HOME``. It answers with the address, then reads lines of JSON and
answers each when it is done: ``["add", NAME, CPUS]`` with the node's number, and ``["add", NAME, CPUS, MORE]`` with
more arguments of Ray's; ``["remove", NAME]`` as if it had lost its power, ``["clear"]`` (the same for all),
``["drain", NAME, SECONDS]`` (a notice that it will be taken away), ``["restart"]`` (the head's control store, killed
and started again), ``["ids"]`` with the number of each node that was not removed, by its name, ``["actors", CLASS]``
with the names of the nodes where actors of such a class have ever been, and ``["asked"]`` with what is asked of the
cluster and nobody has got.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import yaml

from cluster.home import home, marked
from cluster.manifests.kuberay import labels
from cluster.profile import Group
from tests.cluster.autoscaler import drain

STORE_BYTES = 80 << 20  # of objects, on each
TRIES = 5  # to bring up the head, and each node


class Nodes:
    """What starts and ends them, for a test; all of it ends with this process too: `cluster.home` sees to that."""

    def __init__(self, folder):
        self.ends = ExitStack()
        for number in range(TRIES):  # where the machine is very busy a head ends, too
            self.process = self._started(folder / f"{number}", self.ends.enter_context(home()))
            said = self.process.stdout.readline()
            if said:
                break
        self.address = json.loads(said)

    @staticmethod
    def _started(folder, where):
        with marked(where):
            return subprocess.Popen(
                [sys.executable, "-m", "tests.pipelines.nodes", str(folder), str(where)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip

    def __call__(self, *asked):
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.ends.close()


FOUR = {"a": "cpu", "b": "cpu", "c": "cpu", "d": "l4"}
PROFILE = """
name: four
place: address
address: ADDRESS
storage: STORE
shared: [/]
head: {cpus: 1, memory_gib: 8}
groups:
  cpu: {cpus: 1, memory_gib: 8, min_nodes: 3, max_nodes: 3}
  l4: {cpus: 1, memory_gib: 8, gpus: 1, accelerator: L4}
  h100: {cpus: 1, memory_gib: 8, gpus: 1, accelerator: H100, max_nodes: 8}
"""


class FourNodes(Nodes):
    """A head that computes nothing, three nodes of one group, one of another, and none of a third one."""

    def profile(self, folder):
        """The file of a profile of it, whose store is below a folder."""
        file = folder / "profile.yaml"
        file.write_text(PROFILE.replace("ADDRESS", f"'{self.address}'").replace("STORE", str(folder / "store")))
        return file

    def complete(self):
        """Bring back those that were removed."""
        there, groups = self("ids"), yaml.safe_load(PROFILE)["groups"]
        for name, group in FOUR.items():
            if name not in there:
                machine = Group(**groups[group])
                more = {"num_gpus": machine.gpus, "labels": labels(group, machine)}
                self("add", name, int(machine.cpus), more)


def main(folder, where):
    os.environ.update(
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_raylet_start_wait_time_s="20",  # one that has waited 15 s for its agents ends
        RAY_TMPDIR=str(where),  # also of the file that names the newest cluster of the machine
        RAY_gcs_storage="rocksdb",
        RAY_gcs_storage_path=str(folder / "gcs"),
    )
    out = os.dup(1)
    os.dup2(2, 1)  # what Ray prints is no answer
    # Then agents do without a server that nobody asks, and come up in a fraction of the time.
    sys.modules["ray.dashboard.optional_deps"] = None

    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    made = Cluster(initialize_head=True, head_node_args=head)
    nodes, numbers = {}, {}

    def ids():
        """The node's number by its name."""
        return {name: n["NodeID"] for n in made.global_state.node_table() if n["Alive"] for name in n["Resources"]}

    def added(**asked):
        """A node: its raylet ends where the machine is so busy that it waits too long for its agents."""
        for _ in range(TRIES - 1):
            try:
                return made.add_node(**asked)
            except Exception as error:  # as Ray raises it
                sys.stderr.write(f"A node did not come up: {error}\n")
        return made.add_node(**asked)

    def act(what, name="", number=0, more=None):
        if what == "add":
            more = {"object_store_memory": STORE_BYTES, **(more or {})}
            nodes[name] = added(num_cpus=number, resources={name: 1}, **more)
            numbers[ids()[name]] = name
            return ids()[name]
        if what == "ids":
            return {name: ids()[name] for name in nodes}
        if what == "actors":
            there = made.global_state.actor_table(None).values()
            return sorted({numbers.get(a["Address"]["NodeID"], "head") for a in there if name in a["ActorClassName"]})
        if what == "asked":
            return asked(made.address)
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


def asked(address):
    """What somebody asks for and has not got, a line each."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    wanted = get_cluster_status(address).resource_demands
    return [str(one) for kind in (wanted.ray_task_actor_demand, wanted.placement_group_demand) for one in kind]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
