"""The only place that starts Ray or connects to it."""

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from cluster.capacity import Capacity, Node, here
from cluster.home import home, marked
from cluster.profile import ACCELERATOR_LABEL, GROUP_LABEL, HEAD, HUGE_PAGES
from lfm.errors import LfmError

SETTINGS = {  # read when Ray is imported; some would otherwise depend on the user's home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # What a step leaves running must not outlive its worker.
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
    # How long an ending waits for somebody to hear of its tasks, where nobody is left: 5 s by itself.
    "RAY_task_events_shutdown_flush_timeout_ms": "100",
    **HUGE_PAGES,
}


class NoCluster(LfmError, ConnectionError):
    """A Ray cluster that does not answer, or does not start."""

    def __init__(self, address: str, what: str) -> None:
        super().__init__(address, what)
        self.address, self.what = address, what

    def __str__(self) -> str:
        fix = "Run it again when this machine has less to do." if self.address == "local" else "Check --address."
        return f"Ray at {self.address!r}: {self.what.rstrip('.')}, expected a cluster that answers. {fix}"


@contextmanager
def cluster(address: str = "local") -> Iterator[Capacity]:
    """Be connected to Ray, and leave nothing of it behind.

    Args:
        address: ``local`` starts a cluster of this machine's own that ends with the block; anything else is the
            address of one that runs, which stays.

    Raises:
        NoCluster: It does not answer, or a node of this machine's own did not start in Ray's 30 seconds.
    """
    for name, value in {"RAY_AUTH_MODE": "disabled", **SETTINGS}.items():
        os.environ.setdefault(name, value)
    import ray

    with ExitStack() as stack:
        asked: dict[str, Any] = {"address": address}
        starting: AbstractContextManager[None] = nullcontext()
        if address == "local":
            folder, whole = stack.enter_context(home()), here()
            starting = marked(folder)
            asked |= {"num_cpus": int(whole.cpus), "num_gpus": int(whole.gpus)}
            asked |= {"include_dashboard": False, "_temp_dir": str(folder)}
        try:
            with starting, _own_sigterm() as came:
                ray.init(**asked, log_to_driver=False, logging_level="warning")  # each step writes a log of its own
                interrupted = came()
        except Exception as error:  # Ray raises no narrower one where a node is slow to start
            raise NoCluster(address, str(error).partition("\n")[0]) from error
        stack.callback(ray.shutdown)
        if interrupted:
            raise KeyboardInterrupt
        # For its subreaper Ray ignores SIGCHLD behind Python's back, and every child's exit code would read 0.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield capacity()


@contextmanager
def _own_sigterm() -> Iterator[Callable[[], bool]]:
    """Have SIGTERM do what it did before, after and while Ray brings a handler of its own, which exits.

    What a handler raises is lost where Python or Ray catches everything, as in callbacks: what is yielded says whether
    SIGINT or SIGTERM came, whoever handled it.
    """
    if threading.current_thread() is not threading.main_thread():  # no other hears of signals
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGTERM)
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    heard = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def came() -> bool:
        with suppress(BlockingIOError):
            return not {signal.SIGINT, signal.SIGTERM}.isdisjoint(os.read(read, 1024))
        return False

    try:
        yield came
    except SystemExit as told:
        raise KeyboardInterrupt from told
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(heard)
        os.close(read)
        os.close(write)


def capacity() -> Capacity:
    """What the cluster has to which this process is connected, without the nodes that are about to leave it."""
    return _capacity(but=leaving())


def living() -> Capacity:
    """The same with these: what they do they may still bring to its end."""
    return _capacity(but=frozenset())


def _capacity(*, but: frozenset[str]) -> Capacity:
    import ray

    alive = (n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in but)
    return Capacity.of(_node(n["Resources"], n["Labels"]) for n in alive)


def groups() -> dict[str, int]:
    """How many machines there are of each node group, the head's aside; one of no group is the head's."""
    import ray

    found = Counter(n["Labels"].get(GROUP_LABEL, HEAD) for n in ray.nodes() if n["Alive"])
    return {group: found[group] for group in sorted(found) if group != HEAD}


def session() -> str:
    """The name that Ray gave the cluster when it was started, which all that connect to it hear."""
    import ray

    return str(ray.get_runtime_context().get_session_name())


def leaving() -> frozenset[str]:
    """The nodes of which is known that they will be taken away."""
    import ray

    return frozenset(ray._private.state.state.get_draining_nodes())


def _node(has: Mapping[str, float], labels: Mapping[str, str]) -> Node:
    kinds = frozenset({labels.get(ACCELERATOR_LABEL, "")} - {""})
    return Node(
        cpus=has.get("CPU", 0.0),
        gpus=has.get("GPU", 0.0),
        memory=has.get("memory", 0.0),
        accelerators=kinds,
        group=labels.get(GROUP_LABEL, ""),
    )
