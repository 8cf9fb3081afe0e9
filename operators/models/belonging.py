"""What was made for one model says which in a file of its own; so it is told from what was made for another."""

from collections.abc import Iterator, Mapping
from typing import Any

from lfm.errors import LfmError
from lfm.weight_index import parsed
from operators.artifact import Artifact, Datastore, Delta, Editor, Memory, Model, Statistics, kind_of

OF: Mapping[type[Artifact], str] = {
    Delta: "base",
    Statistics: "model",
    Editor: "model",
    Memory: "model",
    Datastore: "model",
}
"""The kinds that are made for one model, and what their files call its digest."""


class OtherModel(LfmError, ValueError):
    """Something that was made for another model than the one it is used with."""

    def __init__(self, verb: str, what: str, made_for: str, given: str, fix: str) -> None:
        super().__init__(verb, what, made_for, given, fix)
        self.verb, self.what, self.made_for, self.given, self.fix = verb, what, made_for, given, fix

    def __str__(self) -> str:
        return (
            f"{self.what}: made for the model of digest {self.made_for[:12] or 'unknown'}, expected the one that "
            f"{self.verb} is given, {self.given[:12] or 'unknown'}. {self.fix}"
        )


def noted(artifact: Artifact) -> dict[str, Any]:
    """What a file such as ``delta.json`` says.

    Raises:
        WeightsError: There is none, or it is no JSON object.
    """
    path = artifact.path / f"{kind_of(type(artifact))}.json"
    return parsed(path, path.read_bytes() if path.is_file() else b"")


def strange(verb: str, artifact: Artifact | None, model: Model | None, fix: str) -> Iterator[LfmError]:
    """That an artifact was made for another model, where both can be looked at."""
    if artifact is None or model is None:
        return
    try:
        made_for = str(noted(artifact).get(OF[type(artifact)], ""))
    except LfmError as error:
        yield error
        return
    if model.digest and made_for != model.digest:
        yield OtherModel(verb, kind_of(type(artifact)), made_for, model.digest, fix)
