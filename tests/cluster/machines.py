"""A cluster of processes on this machine, as `lfm cluster up` starts it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROFILE = """
name: {name}
place: local
storage: {folder}/store
shared: [/]
head: {{cpus: 1, memory_gib: 1, price_per_hour: 1.0}}
groups:
  cpu: {{cpus: 1, memory_gib: 1, min_nodes: 1, idle_timeout_s: 0.5, price_per_hour: 2.0, labels: {{team: research}}}}
"""


class Typed:
    """Types commands in a process of their own, whose user has a cache of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.profile = folder / "profile.yaml"
        self.profile.write_text(PROFILE.format(name="trial", folder=folder))
        self.records = folder / "cache" / "lfm" / "clusters"
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """The exit code, and what was printed and said."""
        asked = subprocess.run(
            [sys.executable, "-m", "pipelines", *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        return asked.returncode, asked.stdout, asked.stderr

    def data(self, *words: str) -> dict:
        """What a command says as JSON."""
        code, said, error = self(*words, "--json")
        assert code == 0, error
        return json.loads(said)

    def record(self) -> dict:
        """What is written down of the cluster."""
        return json.loads((self.records / "trial.json").read_bytes())


@contextmanager
def cluster_up(folder: Path) -> Iterator[Typed]:
    """A head and a worker, which end with the block."""
    typed = Typed(folder)
    try:
        typed.data("cluster", "up", str(typed.profile))
        yield typed
    finally:
        typed("cluster", "down", str(typed.profile), "--yes")
