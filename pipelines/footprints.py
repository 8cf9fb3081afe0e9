"""Spec -> what each step takes, as its operator says, of inputs that are here and of models that steps will make."""

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

from lfm.errors import LfmError
from operators.artifact import Artifact, Model
from operators.base import Operator
from operators.catalog import Catalog
from operators.code import own
from operators.footprint import Footprint
from operators.resources import Resources
from pipelines.plan import InputProblem, Inspector, arguments
from pipelines.spec import Spec, StepSpec, names_in
from pipelines.storage.base import cache


@dataclass
class Footprints:
    """Asks operators; what is wrong with a step or an input is for the plan to say, and makes unknown what it takes.

    Attributes:
        spec: The pipeline.
        inspector: Looks at what comes from outside.
        catalog: The operators that it names.
    """

    spec: Spec
    inspector: Inspector
    catalog: Catalog
    _seen: dict[str, Artifact | None] = field(default_factory=dict)

    def of(self, name: str, resources: Resources | None = None) -> Footprint | None:
        """What a step takes; None where nobody knows.

        Args:
            name: The step's.
            resources: What it asks for; None takes its own.
        """
        step = self.spec.steps[name]
        verb = self.catalog.operator(step.operator)
        if verb.footprint is None:
            return None
        try:
            # A library that is imported on the way says things, and standard output may be for JSON.
            with own(self.spec.code), redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # what libraries say to each other
                return verb.footprint(**self._given(replace(step, resources=resources or step.resources), verb))
        except LfmError:
            return None

    def _given(self, step: StepSpec, verb: Operator[Any]) -> dict[str, Any]:
        names = [n for reference in step.inputs.values() for n in names_in(reference)]
        seen = {n: found for n in names if (found := self._stand_in(n)) is not None}
        return arguments(step, verb, seen, self.spec, self.catalog)

    def _stand_in(self, name: str) -> Artifact | None:
        """What an input is, or a model of the shape that a step's result will have."""
        if name not in self._seen:
            self._seen[name] = None  # of what goes in circles nothing is known
            self._seen[name] = self._looked_at(name)
        return self._seen[name]

    def _looked_at(self, name: str) -> Artifact | None:
        if name not in self.spec.steps:
            try:
                return self.inspector.check(self.spec.inputs[name])
            except (InputProblem, KeyError):
                return None
        step = self.spec.steps[name]
        verb = self.catalog.operator(step.operator)
        like = step.inputs.get(verb.like or verb.hands_on)
        if isinstance(like, str):
            return self._stand_in(like)
        if verb.config is None:
            return None
        config = verb.config(**self._given(step, verb))
        return None if config is None else _written(config)


def _written(config: Mapping[str, Any]) -> Model:
    """A folder of this user's cache with a model's config and nothing else."""
    said = json.dumps(config, sort_keys=True, default=str)
    folder = cache() / "configs" / hashlib.sha256(said.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(said)
    return Model(str(folder))
