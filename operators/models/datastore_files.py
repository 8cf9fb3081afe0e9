"""A datastore's folder: keys, the tokens that followed them, the method that reads them, and of which model they are.

An index of FAISS is a file of FAISS's own format beside them, and no pickle. It is read only where `datastore.json`
names it by its digest.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import TypeAdapter

from lfm.errors import LfmError
from lfm.retrieval.base import Array, Retrieve, Search
from lfm.weights import Header, Weights, Writer
from operators.artifact import Adapter, Artifact, Datastore, Delta, Model, kind_of
from operators.catalog import Catalog, method_name
from operators.models.belonging import noted, strange

STEM = "datastore"
INDEX = "index.faiss"
KEY, VALUE = "key", "value"  # the columns of a part
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}
STORED: Mapping[torch.dtype, "np.dtype[Any]"] = {
    torch.float32: np.dtype("<f4"),
    torch.float16: np.dtype("<f2"),
    torch.int32: np.dtype("<i4"),
}
REMADE = "Make the datastore again."


class DatastoreError(LfmError, ValueError):
    """A datastore that cannot be read, or not be used so."""

    def __init__(self, where: str, what: str, allowed: str, fix: str) -> None:
        super().__init__(where, what, allowed, fix)
        self.where, self.what, self.allowed, self.fix = where, what, allowed, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected {self.allowed}. {self.fix}"


def write(
    folder: Path,
    method: Retrieve,
    parts: Sequence[Path],
    *,
    entries: int,
    width: int,
    precision: str,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``datastore.safetensors``, ``datastore.json`` and, where the method searches by one, ``index.faiss``.

    The keys of shape (entries, width) are written and indexed in stretches, and never held at once.

    Args:
        folder: Where to.
        method: Who reads it.
        parts: Parquet files with a column ``key``, bytes of `precision`, and one ``value``, int32.
        entries: How many are taken, the first ones.
        width: Values of a key.
        precision: ``float32`` or ``float16``.
        about: What else is noted: the digest of the ``model`` above all.

    Returns:
        What was noted.
    """
    dtype = PRECISIONS[precision]
    headers = {"keys": Header((entries, width), dtype), "values": Header((entries,), torch.int32)}
    writer = Writer(folder, headers, stem=STEM)
    writer.allocate()
    done = 0
    with writer.opened("keys") as put_keys, writer.opened("values") as put_values:
        for part in parts:
            for batch in pq.ParquetFile(part).iter_batches():
                some = batch.slice(0, entries - done)
                held = b"".join(some[KEY].to_pylist())
                if held:
                    put_keys(done * width, torch.frombuffer(bytearray(held), dtype=dtype))
                    put_values(done, torch.tensor(some[VALUE].to_numpy()))
                done += len(some)
    told: dict[str, Any] = {
        **about,
        "method": {"name": method_name(type(method)), **method.hyperparameters()},
        "entries": entries,
        "width": width,
        "precision": precision,
    }
    if (index := method.build(_array(Weights(folder, STEM), "keys"))) is not None:
        import faiss

        faiss.write_index(index, str(folder / INDEX))
        told["index"] = {"file": INDEX, "sha256": _sha256(folder / INDEX)}
    (folder / f"{STEM}.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
    return told


def opened(datastore: Datastore) -> tuple[Retrieve, Search]:
    """The method that reads a datastore, and what searches it; keys are read from the disk as they are needed.

    Raises:
        DatastoreError: Its files do not fit each other, or ``datastore.json`` does not say how it is read.
        WeightsError: A file is not there or damaged.
        UnknownName: It is of a method that this project does not have.
        LfmError: The method takes a library that is not installed.
    """
    method = _method(datastore)
    told = noted(datastore)
    weights = Weights(datastore.path, STEM)
    wanted = {
        "keys": Header((told.get("entries", 0), told.get("width", 0)), PRECISIONS.get(str(told.get("precision")))),  # type: ignore[arg-type]
        "values": Header((told.get("entries", 0),), torch.int32),
    }
    for name, header in wanted.items():
        if weights.headers.get(name) != header:
            what = f"its {name} are not those of {STEM}.json"
            raise DatastoreError(_called(datastore), what, "files that were made together", REMADE)
    method.check(None, wanted["keys"].shape[1])
    return method, method.opened(_array(weights, "keys"), _array(weights, "values"), _index(datastore, told))


def unfit(verb: str, datastore: Datastore, model: Model | None) -> Iterator[LfmError]:
    """Why a datastore is not to be put beside a model, as far as is known."""
    yield from strange(verb, datastore, model, "Give the model that it was made for, or index the corpus anew.")
    try:
        _method(datastore).check(None, None)
    except LfmError as problem:
        yield problem


def not_beside(kind: type[Artifact]) -> DatastoreError | None:
    """What is said where a datastore comes with something that it cannot be beside."""
    if kind in (Adapter, Delta):
        allowed = "the model that it was made for"
        return DatastoreError(
            "datastore", f"it is given with {kind_of(kind)!r}", allowed, "Write the whole model first."
        )
    return None


def not_both(verb: str) -> DatastoreError:
    """What is said where a memory and a datastore are given at once: the keys would be another model's."""
    what = "a memory and a datastore are given, whose keys are of the model without the memory"
    return DatastoreError(verb, what, "one of them", "Leave one out.")


def _method(datastore: Datastore) -> Retrieve:
    try:
        fields = dict(noted(datastore)["method"])
        found = Catalog().method(Retrieve, str(fields.pop("name")))
        method: Any = TypeAdapter(found).validate_python(fields)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LfmError):
            raise
        what = f"its {STEM}.json does not say how it is read"
        raise DatastoreError(_called(datastore), what, "'model' and 'method'", REMADE) from error
    assert isinstance(method, Retrieve)
    return method


def _index(datastore: Datastore, told: Mapping[str, Any]) -> Any:
    """The index that ``datastore.json`` names, None where it names none."""
    if "index" not in told:
        return None
    path = datastore.path / INDEX
    if not path.is_file() or told["index"] != {"file": INDEX, "sha256": _sha256(path)}:
        what = f"its {INDEX} is not the one that {STEM}.json names"
        raise DatastoreError(_called(datastore), what, "a file of that sha256", REMADE)
    import faiss

    return faiss.read_index(str(path))


def _array(weights: Weights, name: str) -> Array:
    header = weights.headers[name]
    with weights.opened(name) as stored:
        return np.memmap(stored.path, mode="r", dtype=STORED[header.dtype], offset=stored.offset, shape=header.shape)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _called(datastore: Datastore) -> str:
    return f"datastore {datastore.uri!r}"
