"""The verb `index`: every state of a model on a corpus, and the token that followed it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from lfm.errors import HyperparameterError, LfmError
from lfm.hooks import Blocks
from lfm.retrieval.base import Array, Retrieve
from operators.artifact import Dataset, Datastore, Model
from operators.base import operator
from operators.data.batches import Document, NoLossToken, documents, on_device, packed
from operators.data.rows import SPOKEN, read_rows
from operators.data.vocabulary import digest
from operators.engines.native import Native
from operators.models.datastore_files import KEY, PRECISIONS, VALUE, write
from operators.models.language_models import architecture_of, check, load, load_tokenizer, outline
from operators.models.texts import check_length, unfit
from operators.sharing.parts import in_parts
from operators.training import Training
from operators.workspace import Workspace

Precision = Literal["float32", "float16"]


class NotFiniteKey(LfmError, ArithmeticError):
    """A state that a datastore cannot hold."""

    def __init__(self, document: int, precision: str) -> None:
        super().__init__(document, precision)
        self.document, self.precision = document, precision

    def __str__(self) -> str:
        fix = "Set precision to float32." if self.precision == "float16" else "Look for it in the model."
        return (
            f"keys of the documents from {self.document + 1} on: infinite or not a number in {self.precision}, "
            f"expected finite ones. {fix}"
        )


def _foreseen(
    *,
    model: Model | None,
    data: Dataset | None,
    method: Retrieve,
    length: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 32,
    **_: object,
) -> Iterator[str]:
    yield from map(str, _out_of_range(length, stride, max_tokens, batch_size))
    home = None if model is None else model.path
    yield from unfit(Training(length=max(2, length)), home, {"data": data}, SPOKEN)
    try:
        if home is None or not (home / "config.json").is_file() or architecture_of(home) != "decoder":
            method.check(None, None)
        else:
            _check(method, outline(home))
    except LfmError as problem:
        yield str(problem)


def _check(method: Retrieve, whole: torch.nn.Module) -> None:
    """Refuse a network that the method's fields do not fit."""
    blocks = Blocks(whole)
    name = method.watched(blocks)
    width = whole.get_output_embeddings().in_features if name is None else blocks.sizes(name)[0]  # type: ignore[operator]
    method.check(len(blocks), width)


def _out_of_range(
    length: int, stride: int | None, max_tokens: int | None, batch_size: int
) -> Iterator[HyperparameterError]:
    for holds, field, value, allowed in (
        (length >= 2, "length", length, "length >= 2"),
        (stride is None or 1 <= stride <= length, "stride", stride, "1 <= stride <= length, or none"),
        (max_tokens is None or max_tokens >= 1, "max_tokens", max_tokens, "max_tokens >= 1 or none"),
        (batch_size >= 1, "batch_size", batch_size, "batch_size >= 1"),
    ):
        if not holds:
            yield HyperparameterError("index", field, value, allowed)


@operator(shares_work=True, problems=_foreseen)
def index(
    work: Workspace,
    *,
    model: Model,
    data: Dataset,
    method: Retrieve,
    length: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 32,
    precision: Precision = "float16",
) -> Datastore:
    """Write down every state that a model has on a corpus, with the token that followed; `evaluate` and `serve` use it.

    Each token that an answer holds, or any text, is an entry, but for a document's first one. Several workers of Ray
    Data share the documents; how many there are changes no byte.

    Args:
        work: The step's workspace.
        model: Whose states, in float32; the datastore is for this model alone.
        data: The corpus, a document in each row.
        method: What is stored of a state, and how it is searched.
        length: Tokens that the model reads at once; a longer document is read in windows.
        stride: How far a window begins after the one before: all but the first add only the last `stride` tokens, which
            have `length - stride` tokens before them at least, as the paper has it. None begins where the last window
            ends, as `evaluate` does; the first token of each is no entry then, as nothing comes before it.
        max_tokens: At most so many entries, the first ones; None takes all.
        batch_size: Windows read at once; so many documents are a part of the work.
        precision: Of the stored keys: 2 or 4 bytes for each of their values.

    Raises:
        HyperparameterError: A number is out of range, or the method does not fit the model.
        NoLossToken: There is no token to store.
        NotFiniteKey: A key is infinite or not a number.
        NoBlocks: The model has no layers with an MLP.
        FaissMissing: The method searches by FAISS, which is not installed.
    """
    for problem in _out_of_range(length, stride, max_tokens, batch_size):
        raise problem
    _check(method, outline(model.path))
    rows = read_rows(data, forms=SPOKEN).num_rows
    read = rows if max_tokens is None else _enough(model.path, data, length, stride or length, max_tokens)
    arguments = {
        "model": model.path,
        "data": data,
        "rows": read,
        "method": method,
        "length": length,
        "stride": stride or length,
        "batch_size": batch_size,
        "precision": precision,
    }
    parts = in_parts(work, Indexer, arguments, -(-read // batch_size), "entries")
    found = sum(pq.read_metadata(part).num_rows for part in parts)
    if not found:
        raise NoLossToken(data.uri, rows)
    entries = found if max_tokens is None else min(found, max_tokens)
    folder = work.scratch / "datastore"
    folder.mkdir()
    about = {"model": model.digest, "tokens": digest(model.path), "length": length, "stride": stride or length}
    width = next(w for part in parts if (w := _width(part, precision)))
    told = write(folder, method, parts, entries=entries, width=width, precision=precision, about=about)
    return work.save(Datastore, folder, {**told, "documents": read})


def windows(document: Document, length: int, stride: int) -> Iterator[Document]:
    """The stretches in which a document is read; every token to be told is one in exactly one of them."""
    for start in range(0, len(document.ids), stride):
        known = length - stride if start else 0  # what the window before has told already
        answer = document.answer[start : start + length]
        ids = document.ids[start : start + length]
        yield Document(ids, [False] * min(known, len(ids)) + list(answer[known:]))
        if start + length >= len(document.ids):
            return


def _enough(model: Path, data: Dataset, length: int, stride: int, max_tokens: int) -> int:
    """How many documents hold so many entries: all where there are fewer."""
    count = number = 0
    for document in documents(read_rows(data, forms=SPOKEN).to_pydict(), load_tokenizer(model)):
        number += 1
        count += sum(sum(window.answer[1:]) for window in windows(document, length, stride))
        if count >= max_tokens:
            break
    return number


def _width(part: Path, precision: str) -> int:
    """How many values the keys of a part have; 0 where it has none."""
    first = next(pq.ParquetFile(part).iter_batches(batch_size=1, columns=[KEY]), None)
    return 0 if first is None else int(pc.binary_length(first[KEY])[0].as_py()) // PRECISIONS[precision].itemsize


class Indexer:
    """Reads one batch of documents after another."""

    def __init__(
        self,
        device: torch.device,
        *,
        model: Path,
        data: Dataset,
        rows: int,
        method: Retrieve,
        length: int,
        stride: int,
        batch_size: int,
        precision: str,
    ) -> None:
        whole = load(model, torch.float32)
        check(whole, packed=False)
        self.engine = Native(whole.to(device), load_tokenizer(model), retrieve=method)
        check_length("index", length, self.engine.context)
        self.table = read_rows(data, forms=SPOKEN).slice(0, rows)
        self.length, self.stride, self.batch_size, self.precision = length, stride, batch_size, precision
        self.device = device

    def part(self, number: int) -> pa.Table:
        """The entries of one batch of documents, in their order."""
        some = self.table.slice(number * self.batch_size, self.batch_size).to_pydict()
        found = [w for d in documents(some, self.engine.tokenizer) for w in windows(d, self.length, self.stride)]
        entries = self._read([window for window in found if any(window.answer[1:])])
        keys, values = zip(*entries, strict=True) if entries else ((), ())
        stored = [each for held in keys for each in self._bytes(held, number)]
        return pa.table(
            {
                KEY: pa.array(stored, pa.binary()),
                VALUE: pa.array(np.concatenate(values) if values else [], pa.int32()),
            }
        )

    @torch.inference_mode()
    def _read(self, found: Sequence[Document]) -> list[tuple[torch.Tensor, Array]]:
        """Keys and values of windows, a pair for each batch of them."""
        if not found:
            return []
        padding = self.engine.tokenizer.pad_token_id
        rows = packed(iter(found), length=self.length, padding=padding, packing=False, where="part")
        entries = []
        for start in range(0, len(rows), self.batch_size):
            where = np.arange(start, min(len(rows), start + self.batch_size))
            read, targets = self.engine.answers(on_device(rows, where, self.device))
            entries.append((read.queries.to(PRECISIONS[self.precision]).cpu(), targets.int().cpu().numpy()))
        return entries

    def _bytes(self, keys: torch.Tensor, number: int) -> Iterator[bytes]:
        if not keys.isfinite().all():
            raise NotFiniteKey(number * self.batch_size, self.precision)
        for key in keys.numpy():
            yield key.tobytes()
