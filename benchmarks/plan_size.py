"""What it costs to plan many steps: from a pipeline's text to fingerprints, as `lfm plan` does it.

The pipeline tunes, merges and measures again and again, as a search for hyper-parameters does. Its baseline is PyYAML,
with libyaml, that only reads the same text.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rounds import Figure, command_line, compared, interleaved, said

from pipelines.files import opened
from pipelines.inputs.inspector import Looks
from pipelines.plan import pinned, survey
from pipelines.schedule import Progress, decide
from pipelines.storage.opening import open_storage
from pipelines.store import Store

HEAD = """name: search
inputs:
  text: {dataset: "python://text"}
steps:
  train: {operator: prepare, inputs: {data: text}, params: {part: train}}
  held_out: {operator: prepare, inputs: {data: text}, params: {part: held_out}}
  student:
    operator: pretrain
    inputs: {data: train}
    params: {layers: 4, width: 96, heads: 4, vocabulary: 2048, max_steps: 0}
"""
TRIAL = """  tuned_N:
    operator: tune
    inputs: {model: student, data: train}
    method: {name: lora, rank: RANK, alpha: 32}
    params: {max_steps: 1500, batch_size: 2, length: 256, learning_rate: 2e-3, weight_decay: 0.1}
  merged_N:
    operator: merge
    inputs: {base: student, experts: [tuned_0, tuned_N]}
    method: {name: ties, density: 0.5}
  measured_N:
    operator: evaluate
    inputs: {model: merged_N, data: {text: held_out}}
    params: {length: 256}
"""
READ, PLAN = "PyYAML reads it", "planned"


class Search:
    """A pipeline of about so many steps, as a file."""

    def __init__(self, home: Path, steps: int) -> None:
        self.path = home / f"search_{steps}.yaml"
        trials = [TRIAL.replace("RANK", str(n + 1)).replace("N", str(n)) for n in range(max(1, (steps - 3) // 3))]
        self.path.write_text(HEAD + "".join(trials))
        self.steps = HEAD.count("operator:") + 3 * len(trials)
        self.store = Store(open_storage(str(home / "store")))
        self.looks = Looks(home / "inputs.sqlite", self.store)

    def read(self) -> Any:
        """Only as YAML."""
        return yaml.load(self.path.read_text(), Loader=yaml.CSafeLoader)

    def planned(self) -> Any:
        """With everything that `lfm plan` looks at, and what can start first."""
        found = opened(str(self.path))
        assert not found.problems, found.problems[:3]
        assert not survey(found.spec, self.looks, found.catalog)
        made = pinned(found.spec, self.looks, found.catalog)
        assert len(made.steps) == self.steps
        return decide(made, Progress(), None)


def figures_of(search: Search, rounds: int) -> Figure:
    """Of one pipeline, after a round that imports what its steps name."""

    def seconds(act: Callable[[], Any]) -> Callable[[int], float]:
        def timed(_: int) -> float:
            began = time.perf_counter()
            act()
            return time.perf_counter() - began

        return timed

    search.planned()
    values = interleaved({READ: seconds(search.read), PLAN: seconds(search.planned)}, rounds)
    aim = "< 1 s" if search.steps <= 1000 else ""
    return compared(values, PLAN, READ, unit="s", label=f"a pipeline of {search.steps} steps {PLAN}", aim=aim)


def main() -> None:
    """Measure."""
    parser = command_line(__doc__.partition("\n")[0], rounds=7)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[100, 1000, 3000, 10_000], metavar="N", help="of a pipeline"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plans-") as folder:
        said([figures_of(Search(Path(folder), n), asked.rounds) for n in asked.steps], asked)


if __name__ == "__main__":
    main()
