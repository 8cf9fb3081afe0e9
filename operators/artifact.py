"""What flows along the edges of a pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REWRITES = "lfm.json"
"""The file of a folder that says what of this project rewrites the model that its tensors are for."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something on storage, named by where it is and what it contains.

    Attributes:
        uri: Where it is: a local path, ``hf://name[@revision]``, ``s3://...`` or, inside a step, the local
            folder that holds it.
        digest: What it contains; empty until the plan has looked.
        about: What the step that made it noted, as JSON: an adapter's base, a dataset's columns.
    """

    uri: str
    digest: str = ""
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The local folder or file; only inside a step, where every input has been fetched."""
        assert "://" not in self.uri, self.uri
        return Path(self.uri)


@dataclass(frozen=True, slots=True)
class Model(Artifact):
    """A directory of safetensors with its config and, for text, a tokenizer, or with `lfm.json` of several."""


@dataclass(frozen=True, slots=True)
class Adapter(Artifact):
    """A PEFT directory, or tensors and `lfm.json`; `about["base"]` is the digest of the model it was trained on."""


@dataclass(frozen=True, slots=True)
class Delta(Artifact):
    """A change of a model's weights: `delta.safetensors`, and `delta.json` with the digest of what it changes."""


@dataclass(frozen=True, slots=True)
class Statistics(Artifact):
    """What was measured of a model on data: `statistics.safetensors`, and `statistics.json` with the model's digest."""


@dataclass(frozen=True, slots=True)
class Editor(Artifact):
    """A network that was trained to edit one model: `editor.safetensors` and `editor.json`."""


@dataclass(frozen=True, slots=True)
class Memory(Artifact):
    """Facts that are kept beside a model and consulted at inference: `memory.safetensors` and `memory.json`."""


@dataclass(frozen=True, slots=True)
class Datastore(Artifact):
    """States of one model and what followed them: `datastore.safetensors`, `datastore.json`, an index of FAISS."""


@dataclass(frozen=True, slots=True)
class Dataset(Artifact):
    """Rows: Parquet or JSONL."""


@dataclass(frozen=True, slots=True)
class Metrics(Artifact):
    """What an evaluation found: `metrics.json`."""


@dataclass(frozen=True, slots=True)
class Deployment(Artifact):
    """A running Ray Serve application."""


CARRIED = "facts.jsonl"
"""The facts that a model, an adapter or a delta has been given, by itself or by what it was made from (`facts.py`)."""

KINDS: dict[str, type[Artifact]] = {
    k.__name__.lower(): k
    for k in (Model, Adapter, Delta, Statistics, Editor, Memory, Datastore, Dataset, Metrics, Deployment)
}
"""Every kind of artifact by the word that a pipeline file and a manifest use for it."""


def kind_of(artifact: type[Artifact]) -> str:
    """The word for a kind: ``model`` for `Model`."""
    return artifact.__name__.lower()
