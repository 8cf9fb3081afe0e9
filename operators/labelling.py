"""The verb `label`: what a teacher says, as data: answers to prompts, or the probabilities of each token."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from lfm.errors import HyperparameterError
from lfm.soft_targets import TopK, likeliest
from operators.artifact import Dataset, Model
from operators.base import operator
from operators.data.batches import Document, NoLossToken, documents, on_device, packed
from operators.data.rows import OF_TEXT, Form, form_of, read_rows
from operators.data.vocabulary import digest, tokens
from operators.footprint import Footprint
from operators.learning.memory import answering
from operators.models.ensemble_files import is_ensemble
from operators.models.ensembles import load_decoder
from operators.models.language_models import DTYPES, check, head_size, load_tokenizer
from operators.models.texts import unfit
from operators.resources import Resources
from operators.sharing.parts import in_parts
from operators.teaching.labels import COLUMNS as COLUMNS_OF_LABELS, SAID, SHARES, TOKENS, Labelling, places
from operators.teaching.teacher_text import counted, write_answers
from operators.teaching.teachers import Teacher
from operators.training import Training
from operators.workspace import Workspace

FILE = "data.parquet"
ANSWERED = (Form.PROMPT_COMPLETION, Form.CONVERSATION)
Precision = Literal["float32", "bfloat16", "float16"]


def problems(
    *,
    teacher: Model | None,
    data: Dataset | None,
    what: str = "text",
    top_k: int = 50,
    temperature: float = 1.0,
    length: int = 512,
    max_answer: int = 128,
    batch_size: int = 32,
    **_: object,
) -> Iterator[str]:
    """What headers tell is wrong, a clause each; what is None cannot be looked at yet."""
    yield from map(str, _out_of_range(top_k, temperature, length, max_answer, batch_size))
    seen = Training(length=max(2, length) if what == "probabilities" else 2)
    forms = OF_TEXT if what == "probabilities" else ANSWERED
    yield from unfit(seen, None if teacher is None else teacher.path, {"data": data}, forms)
    size = None if teacher is None else head_size(teacher.path)
    if what == "probabilities" and size is not None and top_k > size:
        yield f"top_k={top_k!r}, expected top_k <= {size}, the vocabulary. Lower it."


def _out_of_range(
    top_k: int, temperature: float, length: int, max_answer: int, batch_size: int
) -> Iterator[HyperparameterError]:
    for holds, field, value, allowed in (
        (top_k >= 1, "top_k", top_k, "top_k >= 1"),
        (temperature > 0, "temperature", temperature, "temperature > 0"),
        (length >= 2, "length", length, "length >= 2"),
        (max_answer >= 1, "max_answer", max_answer, "max_answer >= 1"),
        (batch_size >= 1, "batch_size", batch_size, "batch_size >= 1"),
    ):
        if not holds:
            yield HyperparameterError("label", field, value, allowed)


def _footprint(
    *, teacher: Model | None, length: int, batch_size: int, precision: Precision, resources: Resources, **_: object
) -> Footprint | None:
    """What asking for probabilities takes, which is no less than answers do; None where the teacher is not known."""
    if teacher is None or is_ensemble(teacher.path):
        return None
    return answering(teacher.path, rows=batch_size, length=length, precision=precision, gpus=resources.gpus)


@operator(shares_work=True, problems=problems, takes_ensembles=("teacher",), footprint=_footprint)
def label(
    work: Workspace,
    *,
    teacher: Model,
    data: Dataset,
    what: Literal["text", "probabilities"] = "text",
    top_k: int = 50,
    temperature: float = 1.0,
    length: int = 512,
    max_answer: int = 128,
    batch_size: int = 32,
    precision: Precision = "float32",
) -> Dataset:
    """Write down what a teacher says, so that others learn from it without the teacher.

    Of ``text`` the result is pairs of a prompt and the teacher's answer, for any student to be tuned on. Of
    ``probabilities`` it is the same rows with labels of every token that would be learnt: the `top_k` likeliest tokens
    and what all others have together, 4 * top_k + 2 bytes a token (6 * top_k + 2 where there are more than 65536
    tokens). `distill` takes such data without a teacher; any packing will do, and any length that no document is longer
    than. Several workers share the rows; how many there are changes no byte.

    Args:
        work: The step's workspace.
        teacher: Who is asked.
        data: Prompts whose answers are written anew, so that they are not read and may be empty; or for probabilities
            any rows.
        what: What is asked of the teacher.
        top_k: How many tokens are named, of probabilities.
        temperature: Divides the logits, of probabilities; the student's method has to have the same.
        length: The most tokens that the teacher reads at once, of probabilities; a longer document is cut into pieces.
        max_answer: The most tokens of an answer; one that has not ended then is left out.
        batch_size: Documents read at once, of probabilities; so many are a part of the work.
        precision: What the teacher computes in.

    Raises:
        HyperparameterError: A number is out of range.
        DatasetError: A prompt leaves no room for an answer, or no answer came to an end.
        NoLossToken: There is nothing to label.
    """
    for problem in _out_of_range(top_k, temperature, length, max_answer, batch_size):
        raise problem
    folder = work.scratch / "labelled"
    folder.mkdir()
    if what == "text":
        write_answers(
            work, teacher.path, data, folder / FILE, max_answer=max_answer, precision=precision, name="answers"
        )
        about = {"form": Form.PROMPT_COMPLETION.value, **counted(folder / FILE)}
        return work.save(Dataset, folder, {"teacher": teacher.digest, **about})
    vocabulary = _vocabulary(teacher.path)
    if top_k > vocabulary:
        raise HyperparameterError("label", "top_k", top_k, f"top_k <= {vocabulary}, the vocabulary")
    labelling = Labelling(
        top_k=top_k,
        vocabulary=vocabulary,
        temperature=temperature,
        length=length,
        longest=0,  # known when all have been read
        tokens=digest(teacher.path),
    )
    arguments = {
        "teacher": teacher.path,
        "data": data,
        "labelling": labelling,
        "batch_size": batch_size,
        "precision": precision,
    }
    total = -(-read_rows(data).num_rows // batch_size)
    found = _joined(in_parts(work, Labeller, arguments, total, "labels"), folder / FILE, data.uri)
    return work.save(Dataset, folder, {"teacher": teacher.digest, **found})


def _vocabulary(folder: Path) -> int:
    """How many tokens there are: what a head has beyond them is padding."""
    known = tokens(folder) or dict.fromkeys(load_tokenizer(folder).get_vocab().values(), "")
    return min(max(known) + 1, head_size(folder) or max(known) + 1)


class Labeller:
    """Asks the teacher of one batch of documents after another."""

    def __init__(
        self,
        device: torch.device,
        *,
        teacher: Path,
        data: Dataset,
        labelling: Labelling,
        batch_size: int,
        precision: str,
    ) -> None:
        model = load_decoder(teacher, DTYPES[precision])
        check(model, packed=False)
        self.teacher = Teacher(model.to(device), temperature=labelling.temperature, packed=False)
        self.tokenizer, self.table = load_tokenizer(teacher), read_rows(data)
        self.labelling, self.batch_size, self.device = labelling, batch_size, device

    def part(self, number: int) -> pa.Table:
        """The labelled rows of one batch."""
        some = self.table.slice(number * self.batch_size, self.batch_size)
        found = list(documents(some.to_pydict(), self.tokenizer))
        columns = self.labelling.columns(found, self._said(found))
        longest = max(len(document.ids) for document in found)
        table = pa.table({**{name: some[name] for name in some.column_names}, **columns})
        return table.replace_schema_metadata({SAID: replace(self.labelling, longest=longest).said()})

    def _said(self, found: Sequence[Document]) -> TopK | None:
        """What it says of all tokens to be learnt, one document after another; nothing where there are none."""
        if not any(places(document, self.labelling.length) for document in found):
            return None
        padding = self.tokenizer.pad_token_id
        rows = packed(iter(found), length=self.labelling.length, padding=padding, packing=False, where="part")
        parts = []
        for start in range(0, len(rows), self.batch_size):  # documents that were cut are several rows
            batch = on_device(rows, np.arange(start, min(len(rows), start + self.batch_size)), self.device)
            said = likeliest(self.teacher.asked_of(batch), self.labelling.top_k, self.labelling.vocabulary)
            parts.append((said.tokens.cpu(), said.shares.cpu()))
        tokens, shares = (torch.cat(values) for values in zip(*parts, strict=True))
        return TopK(tokens, shares, self.labelling.vocabulary, self.labelling.temperature)


def _joined(parts: Sequence[Path], file: Path, where: str) -> dict[str, object]:
    """Write the parts as one file, each a group of its rows, and say what there is."""
    schemas = [pq.read_schema(part) for part in parts]
    labellings = [Labelling.of(schema) for schema in schemas]
    labelling = replace(labellings[0], longest=max(each.longest for each in labellings))
    schema = schemas[0].with_metadata({SAID: labelling.said()})
    own = [name for name in schema.names if name not in COLUMNS_OF_LABELS]
    compression = {name: "zstd" if name in own else "none" for name in schema.names}  # labels keep the size they say
    rows = size = 0
    with pq.ParquetWriter(file, schema, compression=compression, use_dictionary=own, write_statistics=own) as writer:
        for part in parts:
            table = pq.read_table(part)
            rows += table.num_rows
            size += pc.sum(pc.binary_length(table[TOKENS])).as_py() + pc.sum(pc.binary_length(table[SHARES])).as_py()
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    if not size:
        raise NoLossToken(where, rows)
    per_token = labelling.bytes_per_token
    counts = {"rows": rows, "loss_tokens": size // per_token, "bytes_per_token": per_token}
    return {"form": form_of(own).value, **asdict(labelling), **counts}
