"""The words that a job on a cluster runs, however it comes there: by `lfm submit`, or in a rendered RayJob."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

OWN = "own"
"""The folder of a package with the pipeline's file and the code that it names; the profile lies beside it."""
PROFILE = "profile.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrypoint:
    """The command that drives a run from inside of a cluster, in the unpacked package as its folder.

    It can be run again: a run that the store has already goes on where it was, as with `lfm resume`. So a job that is
    retried, also on a new cluster, repeats nothing.

    Attributes:
        pipeline: The pipeline's file in the package, or the name of a recipe.
        run: The run's name.
        store: Where artifacts and runs are kept, as every machine sees it.
        changes: What ``--set`` says.
        until: The only step that is wanted, with what it needs; empty wants all.
        mlflow: Where MLflow keeps runs; empty leaves that to the cluster.
        deadline_s: Seconds for which the run may work in all; 0 sets no limit.
        max_cost: What it may cost in all, in the profile's currency; 0 sets no limit.
        priority: Of several runs that want the same machines, the one with the highest comes first.
        labels: Whom the cost is for.
        python: The interpreter.
    """

    pipeline: str
    run: str
    store: str
    changes: tuple[str, ...] = ()
    until: str = ""
    mlflow: str = ""
    deadline_s: float = 0.0
    max_cost: float = 0.0
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    python: str = "python"

    @property
    def words(self) -> tuple[str, ...]:
        """The command's words."""
        told = {
            "--until": self.until,
            "--mlflow": self.mlflow,
            "--deadline": f"{self.deadline_s:.12g}s" if self.deadline_s else "",
            "--max-cost": f"{self.max_cost:.12g}" if self.max_cost else "",
            "--priority": str(self.priority) if self.priority else "",
        }
        return (
            *(self.python, "-m", "pipelines", "run", self.pipeline),
            *(word for change in self.changes for word in ("--set", change)),
            *(word for name, value in told.items() if value for word in (name, value)),
            *(word for name, value in self.labels.items() for word in ("--label", f"{name}={value}")),
            *("--store", self.store, "--cluster", PROFILE, "--address", "auto", "--as", self.run),
        )

    def __str__(self) -> str:
        """The same as a line for a shell."""
        return shlex.join(self.words)
