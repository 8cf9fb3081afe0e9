"""What a step that does nothing costs beside a bare Ray task, and a chain of them when it is in the store already.

Three things: a chain on a warm Ray, with journal, commit and lookups; the same chain fully cached, as a whole process;
and `lfm --help`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rounds import Figure, command_line, compared, interleaved, said
from warm_ray import driven

from cluster.connect import cluster
from pipelines.__main__ import ROOT

NOOP = '''
from collections.abc import Sequence

from operators.artifact import Dataset
from operators.base import operator
from operators.workspace import Workspace


@operator()
def noop(work: Workspace, *, after: Sequence[Dataset] = (), number: int = 0) -> Dataset:
    """Write a number."""
    path = work.scratch / "number.txt"
    path.write_text(str(number))
    return work.save(Dataset, path)
'''
BARE, OURS = "bare Ray tasks", "no-op steps"

# Says where a process's time goes: to the command's imports and to the command; the rest is Python's own start.
PROCESS = """
import sys, time
began = time.perf_counter()
import json
import pipelines.commands.run
from pipelines.__main__ import main
imported = time.perf_counter()
code = main(sys.argv[1:])
ended = time.perf_counter()
heavy = [m for m in ("ray", "mlflow", "torch", "transformers") if m in sys.modules]
print(json.dumps({"code": code, "imports": imported - began, "ours": ended - imported, "heavy": heavy}))
"""


class Chain:
    """A pipeline of no-op steps in a folder, each of which needs the one before."""

    def __init__(self, home: Path, steps: int) -> None:
        self.home, self.steps, self.store = home, steps, home / "store"
        (home / "noop.py").write_text(NOOP)

    def written(self, number: int) -> Path:
        """The chain as a file; another number makes other results."""
        lines = ["name: chain", "uses: [noop.py]", "steps:"]
        for i in range(self.steps):
            after = f", inputs: {{after: [s{i - 1}]}}" if i else ""
            lines.append(f"  s{i}: {{operator: noop, params: {{number: {number * self.steps + i}}}{after}}}")
        path = self.home / "chain.yaml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def seconds(self, number: int) -> float:
        """A step's share of running it on a Ray that is there."""
        return driven(self.written(number), self.store)[0] / self.steps

    def typed(self, *words: str) -> dict[str, Any]:
        """`lfm run` in a process of its own: what it says of itself, and `process`, the seconds of all of it."""
        words = ("run", str(self.home / "chain.yaml"), "--store", str(self.store), *words)
        said, seconds = timed_process("-c", PROCESS, *words)
        return {**json.loads(said.splitlines()[-1]), "process": seconds}


def timed_process(*words: str) -> tuple[str, float]:
    """What a new Python prints, and its seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout, time.perf_counter() - began


def bare_seconds(steps: int) -> float:
    """A task's share of as many of Ray's own, one after another."""
    import ray

    task = ray.remote(max_retries=0)(_nothing)
    began = time.perf_counter()
    for i in range(steps):
        ready, _ = ray.wait([task.remote(i)])
        ray.get(ready[0])
    return (time.perf_counter() - began) / steps


def _nothing(number: int) -> int:
    return number


def on_a_warm_ray(chain: Chain, rounds: int) -> list[Figure]:
    """Steps against tasks, after a round that starts workers and imports what they need."""
    with cluster("local"):
        chain.seconds(0)
        bare_seconds(chain.steps)
        values = interleaved(
            {
                BARE: lambda _: 1e3 * bare_seconds(chain.steps),
                OURS: lambda number: 1e3 * chain.seconds(1 + number),
            },
            rounds,
        )
    label = f"a no-op step of a chain of {chain.steps} on a warm Ray, journal and commit included"
    return [compared(values, OURS, BARE, unit="ms", label=label, aim="<= 20 ms")]


def whole_processes(chain: Chain, rounds: int) -> list[Figure]:
    """`lfm run` when nothing of a chain is in the store and when all is, against a script that starts Ray itself."""
    split: dict[str, list[float]] = {"ours": [], "imports": []}

    def first(number: int) -> float:
        chain.written(rounds + 1 + number)
        said = chain.typed("--mlflow", "none")
        assert "ray" in said["heavy"], "it was in the store already"
        return float(said["process"])

    def cached(number: int) -> float:
        chain.written(0)
        said = chain.typed()
        assert not {"ray", "mlflow"} & set(said["heavy"]), "a cached run has no use for them"
        split["ours"].append(said["ours"])
        split["imports"].append(said["process"] - said["ours"])
        return float(said["process"])

    rivals = {
        BARE: lambda _: timed_process(__file__, "--bare", "--steps", str(chain.steps))[1],
        "first": first,
        "cached": cached,
    }
    values = interleaved(rivals, rounds)
    label, beside = f"a run of {chain.steps} steps, whole process", "interpreter and imports"
    return [
        compared(values, "first", BARE, unit="s", label=f"{label}, first"),
        compared(values, "cached", BARE, unit="s", label=f"{label}, fully cached"),
        compared(
            {"ours": split["ours"], beside: split["imports"]}, "ours", beside, unit="s",
            label=f"{label}, fully cached, beside imports", aim="< 0.5 s",
        ),
    ]  # fmt: skip


def asking_for_help(rounds: int) -> list[Figure]:
    """`lfm --help` against Python that does nothing."""
    rivals: dict[str, Callable[[int], float]] = {
        "python -c pass": lambda _: timed_process("-c", "pass")[1],
        "lfm --help": lambda _: timed_process("-m", "pipelines", "--help")[1],
    }
    return [compared(interleaved(rivals, rounds), "lfm --help", "python -c pass", unit="s", aim="< 0.3 s")]


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=5)
    parser.add_argument("--steps", type=int, default=100, help="of the chain")
    parser.add_argument("--bare", action="store_true", help="only start Ray and run as many bare tasks, untimed")
    asked = parser.parse_args()
    if asked.bare:
        with cluster("local"):
            bare_seconds(asked.steps)
        return
    with tempfile.TemporaryDirectory(prefix="steps-") as folder:
        chain = Chain(Path(folder), asked.steps)
        figures = asking_for_help(asked.rounds)
        figures += on_a_warm_ray(chain, asked.rounds)
        figures += whole_processes(chain, asked.rounds)
    said(figures, asked)


if __name__ == "__main__":
    main()
