"""A teacher's probabilities in a data set: how they lie in its file, and what takes the teacher's place with them.

Beside a row's own columns are its document's digest and, of each token to be learnt, the `top_k` likeliest tokens as
16-bit numbers (32-bit beyond 65536 tokens) and as float16 their log-probabilities and that of all others together:
4 * top_k + 2 bytes a token, or 6 * top_k + 2. As they belong to tokens of a document, they fit any packing.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lfm.errors import LfmError
from lfm.soft_targets import TopK
from operators.artifact import Dataset
from operators.data.batches import IGNORED, Batch, Document, Rows, documents, packed
from operators.data.records import BATCH
from operators.data.row_files import PARQUET, files_of
from operators.data.rows import read_rows
from operators.teaching.teachers import unnamed
from operators.training import Training

DOCUMENT, TOKENS, SHARES = "label_document", "label_tokens", "label_shares"
COLUMNS = (DOCUMENT, TOKENS, SHARES)
SAID = b"lfm.labels"  # in the schema's metadata: it goes wherever the file goes

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class LabelsError(LfmError, ValueError):
    """Labels that are not those of the rows."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.where, self.what = where, what

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.what}, expected the document that was labelled. Label the data with this tokenizer."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelling:
    """What is true of all labels of a data set.

    Attributes:
        top_k: How many tokens are named at each place.
        vocabulary: How many there are with all others.
        temperature: Divided the teacher's logits.
        length: The most tokens that the teacher saw at once; longer documents were cut as for a row of so many.
        longest: Tokens of the longest document.
        tokens: The digest of the tokenizer's tokens; empty where it is not known.
    """

    top_k: int
    vocabulary: int
    temperature: float
    length: int
    longest: int
    tokens: str

    @classmethod
    def of(cls, schema: Any) -> "Labelling":
        """What a file's schema says."""
        return cls(**json.loads(schema.metadata[SAID]))

    @property
    def numbers(self) -> "np.dtype[Any]":
        """What numbers a token."""
        return np.dtype("<u2" if self.vocabulary <= 1 << 16 else "<u4")

    @property
    def outcomes(self) -> int:
        """The tokens named, and all others together where there are any."""
        return self.top_k + (self.top_k < self.vocabulary)

    @property
    def bytes_per_token(self) -> int:
        """What one token takes in the file."""
        return self.top_k * self.numbers.itemsize + self.outcomes * 2

    def columns(self, found: Sequence[Document], said: TopK | None) -> dict[str, pa.Array]:
        """The columns of some documents, given what was said of their tokens, one after another."""
        counts = [len(places(d, self.length)) for d in found]
        edges = np.concatenate([[0], np.cumsum(counts)])
        both = (
            (np.zeros((0, self.top_k), self.numbers), np.zeros((0, self.outcomes), "<f2"))
            if said is None
            else (said.tokens.cpu().numpy().astype(self.numbers), said.shares.cpu().numpy().astype("<f2"))
        )
        tokens, shares = ([a[i:j].tobytes() for i, j in itertools.pairwise(edges)] for a in both)
        return {
            DOCUMENT: pa.array([digest_of(d) for d in found], pa.binary(8)),
            TOKENS: pa.array(tokens, pa.binary()),
            SHARES: pa.array(shares, pa.binary()),
        }

    def said(self) -> bytes:
        """What stands in the schema."""
        return json.dumps(asdict(self), sort_keys=True).encode()


def labelling_of(dataset: Dataset) -> Labelling | None:
    """How rows are labelled, from headers only; None where they are not."""
    try:
        file = None if "://" in dataset.uri else files_of(Path(dataset.uri))[0]
        schema = pq.read_schema(file) if file is not None and file.name.endswith(PARQUET) else None
    except (LfmError, OSError, pa.ArrowException):  # what reads the rows says what is wrong with them
        return None
    return Labelling.of(schema) if schema is not None and SAID in (schema.metadata or {}) else None


def digest_of(document: Document) -> bytes:
    """Of its tokens and of which of them are learnt."""
    parts = (np.asarray(document.ids, "<i4").tobytes(), np.asarray(document.answer, np.uint8).tobytes())
    return hashlib.sha256(b"".join(parts)).digest()[:8]


def places(document: Document, length: int) -> list[int]:
    """Its tokens that are learnt: not those that begin a piece, which nothing comes before."""
    return [i for i, learnt in enumerate(document.answer) if learnt and i % length]


class StoredLabels:
    """What a teacher said of the loss tokens of labelled data, in its place."""

    def __init__(self, *, top_k: int | None, folder: Path) -> None:
        """Have nothing yet.

        Args:
            top_k: Use only so many of each place's tokens; None all that there are.
            folder: Where files without a name may lie.
        """
        self.top_k, self.folder = top_k, folder
        self.known: list[_Labelled] = []

    def rows(self, data: Dataset, tokenizer: Any, training: Training) -> Rows:
        """Labelled data, tokenized and packed; their labels are at hand from now on.

        Raises:
            LabelsError: A document is not the one that was labelled.
        """
        labelling = labelling_of(data)
        assert labelling is not None, data.uri
        found = list(documents(read_rows(data).to_pydict(), tokenizer))

        def fill(given: Iterator[Document]) -> Rows:
            return packed(
                given,
                length=training.length,
                padding=tokenizer.pad_token_id,
                packing=training.packing,
                where=data.uri,
            )

        rows = fill(iter(found))
        labels = _Labelled(labelling, rows, fill(_numbered(found, training.length)), self)
        labels.read(data, found)
        self.known.append(labels)
        return rows

    def says(self, batch: Batch) -> TopK:
        """What was said of the loss tokens of a batch."""
        return next(labels for labels in self.known if labels.rows is batch.rows).recall(batch)


def _numbered(found: Sequence[Document], length: int) -> Iterator[Document]:
    """The same documents with the number of its label in each token's place: packed alike, they say where it goes."""
    number = 0
    for document in found:
        ids = [0] * len(document.ids)
        for place in places(document, length):
            ids[place] = number
            number += 1
        yield Document(ids, document.answer)


class _Labelled:
    """The labels of one data set, in files that go with the process."""

    def __init__(self, labelling: Labelling, rows: Rows, numbered: Rows, kept: StoredLabels) -> None:
        self.labelling, self.rows, self.targets = labelling, rows, numbered.targets
        self.k = kept.top_k or labelling.top_k
        outcomes = self.k + (self.k < labelling.vocabulary)
        self.tokens = unnamed(kept.folder, labelling.numbers, (rows.loss_tokens, self.k))
        self.shares = unnamed(kept.folder, np.dtype("<f2"), (rows.loss_tokens, outcomes))

    def read(self, data: Dataset, found: Sequence[Document]) -> None:
        """Take the labels out of the files, checking that each is of its document."""
        at, number = 0, 0
        for file in files_of(Path(data.uri)):
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=BATCH, columns=list(COLUMNS)):
                    for row in batch.to_pylist():
                        if row[DOCUMENT] != digest_of(found[number]):
                            raise LabelsError(f"{file} row {number + 1}", "its tokens are others")
                        at += self._take(row[TOKENS], row[SHARES], at)
                        number += 1

    def _take(self, tokens: bytes, shares: bytes, at: int) -> int:
        named = np.frombuffer(tokens, self.labelling.numbers).reshape(-1, self.labelling.top_k)
        said = np.frombuffer(shares, "<f2").reshape(-1, self.labelling.outcomes)
        count = len(named)
        self.tokens[at : at + count] = named[:, : self.k]
        self.shares[at : at + count] = fewer(said, self.k)
        return count

    def recall(self, batch: Batch) -> TopK:
        learnt = self.targets[batch.where][:, : batch.targets.shape[1]]
        # A worker without rows gets one of which nothing is to be learnt.
        wanted = (batch.targets != IGNORED).cpu().numpy()
        numbers: Numbers = learnt[wanted].astype(np.int64)
        device = batch.ids.device
        tokens = torch.from_numpy(self.tokens[numbers].astype(np.int32)).to(device)
        shares = torch.from_numpy(self.shares[numbers]).to(device)
        return TopK(tokens, shares, self.labelling.vocabulary, self.labelling.temperature)


def fewer(shares: "np.ndarray[Any, Any]", k: int) -> "np.ndarray[Any, Any]":
    """Log-probabilities of the `k` likeliest outcomes, the rest taken together; as they are where there is no rest."""
    if shares.shape[1] <= k + 1:
        return shares
    named, rest = shares[:, :k], shares[:, k:].astype(np.float32)
    return np.concatenate([named, np.logaddexp.reduce(rest, axis=1, keepdims=True).astype(shares.dtype)], axis=1)
