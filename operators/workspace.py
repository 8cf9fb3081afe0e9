"""What a running step may touch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from operators.artifact import Artifact
from operators.resources import Resources

A = TypeVar("A", bound=Artifact)


Heard = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a trial: of steps of a pipeline that were run again with other values.

    Attributes:
        run: The trial's own run.
        changes: The values that were changed, by ``STEP.FIELD``.
        state: ``done``, ``failed``, ``stopped`` (by who followed it, or where a step was to rest) or ``interrupted``.
        error: Why it failed; empty where it did not.
        began: Seconds since 1970.
        seconds: How long it took.
        computed: The steps that ran.
        reused: The steps whose results were in the store.
        made: What the steps made that the operator's inputs name, by input.
        measures: What a step measured where it was to rest.
    """

    run: str
    changes: Mapping[str, Any]
    state: str
    error: str = ""
    began: float = 0.0
    seconds: float = 0.0
    computed: Sequence[str] = ()
    reused: Sequence[str] = ()
    made: Mapping[str, Artifact] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)


class Trials(Protocol):
    """The steps that an operator's inputs name (`Operator.repeats`), to be run again; other processes may do that."""

    def written(self, fields: Iterable[str]) -> dict[str, Any]:
        """The values of some ``STEP.FIELD`` as the pipeline has them."""

    def at_once(self, fields: Iterable[str]) -> int:
        """How many trials that differ in these fields the cluster has room for."""

    def run(self, changes: Mapping[str, Any], *, step: str = "", heard: Heard | None = None) -> Outcome:
        """Run the steps with some values changed, unless that was done before: then say what became of it.

        Args:
            changes: The values, by ``STEP.FIELD``.
            step: A step that is followed.
            heard: Called now and then with how far that step is and what it measures there. Where it raises
                `SystemExit`, the trial is stopped, with all that it has under way.
        """

    def outcomes(self) -> list[Outcome]:
        """What became of all that this step has begun so far, in that order, by earlier attempts too."""

    def spent(self) -> float | None:
        """What the machines have cost while the operator's step ran, earlier attempts too; None without prices."""

    def forget(self, step: str) -> None:
        """Drop the checkpoints at which a step of trials rests: none will go on from there."""


class Workspace(Protocol):
    """Handed to every operator body; the only door to disk, randomness and progress."""

    @property
    def scratch(self) -> Path:
        """An empty folder of this step's own, gone when it ends."""

    @property
    def seed(self) -> int:
        """Decided by the fingerprint, so that a retry draws the same numbers."""

    @property
    def resources(self) -> Resources:
        """What the step was given."""

    def progress(self, done: int, total: int, **measures: float) -> None:
        """Say how far the step is, and what it measures there (a loss): cheap, call it at every step."""

    def keep(self, folder: Path) -> None:
        """Keep a folder below `scratch` as a checkpoint of this step.

        It holds a `manifest.json`, a JSON object to which what is known of the other files is added as ``files``. The
        newest whole one of the last two counts; both go when the step ends well.
        """

    def kept(self) -> Path | None:
        """The checkpoint that an earlier attempt at the same fingerprint kept last, or None."""

    def leaving(self) -> bool:
        """Whether this machine is about to be taken away, or the run to end: keep what there is, raise `Preempted`."""

    def regrouped(self, workers: int, why: str) -> None:
        """Say that from now on so many workers share the step's work."""

    def save(self, kind: type[A], path: Path, about: Mapping[str, object] | None = None) -> A:
        """Make what lies at `path`, a file or a folder below `scratch`, an artifact.

        The files move into the store when the step ends well; until then nothing is committed.
        """

    def register(self, artifact: Artifact, name: str, alias: str) -> int:
        """Give an input a version under `name`, unless it has one, move `alias` to that, and return its number."""

    def trials(self) -> Trials:
        """The steps that the operator repeats."""
