"""Answers that a teacher writes, in the place of the data's: each prompt once, greedily, as text."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from operators.artifact import Dataset
from operators.data.batches import documents
from operators.data.row_files import DatasetError
from operators.data.rows import COLUMNS, SOURCE, TYPES, Form, read_rows
from operators.engines.native import Native, Sampling
from operators.models.ensembles import load_decoder
from operators.models.language_models import DTYPES, load_tokenizer
from operators.sharing.parts import in_parts
from operators.workspace import Workspace

TOGETHER = 64  # prompts answered at once; fixed, so that any number of workers writes the same
CUT = b"lfm.cut"


def write_answers(
    work: Workspace, teacher: Path, data: Dataset, file: Path, *, max_answer: int, precision: str, name: str
) -> None:
    """Answer the last turn of each row of `data`, and write prompts and answers as a Parquet file.

    An answer that has not ended after `max_answer` tokens is left out: who learnt it would stop there.

    Args:
        work: The step's workspace; its workers share the prompts.
        teacher: The folder of who answers.
        data: Pairs or conversations, of which the answers are not read.
        file: What is written.
        max_answer: The most tokens of an answer.
        precision: What the teacher computes in.
        name: Of this piece of work in the step.

    Raises:
        DatasetError: A prompt leaves no room for an answer, or no answer came to an end.
    """
    total = -(-read_rows(data).num_rows // TOGETHER)
    arguments = {"teacher": teacher, "data": data, "max_answer": max_answer, "precision": precision}
    tables = [pq.read_table(part) for part in in_parts(work, Writer, arguments, total, name)]
    cut = sum(int(table.schema.metadata[CUT]) for table in tables)
    whole = pa.concat_tables([t.replace_schema_metadata() for t in tables]).combine_chunks()
    if not whole.num_rows:
        what = (
            f"the teacher came to no end within max_answer={max_answer} in any of {cut} answers, expected some to end"
        )
        raise DatasetError(data.uri, what, "Raise max_answer, or take a teacher that was tuned on answers.")
    pq.write_table(whole.replace_schema_metadata({CUT: str(cut)}), file, compression="zstd")


def counted(file: Path) -> dict[str, int]:
    """How many ``rows`` of answers a file has, and how many were ``cut`` and so left out of it."""
    found = pq.read_metadata(file)
    return {"rows": found.num_rows, "cut": int(found.metadata[CUT])}


class Writer:
    """Answers the prompts of one part after another."""

    def __init__(self, device: torch.device, *, teacher: Path, data: Dataset, max_answer: int, precision: str) -> None:
        self.engine = Native(load_decoder(teacher, DTYPES[precision]).to(device), load_tokenizer(teacher))
        self.table, self.uri, self.max_answer = read_rows(data), data.uri, max_answer

    def part(self, number: int) -> pa.Table:
        """The answered rows of one part; how many answers were cut is in the metadata."""
        first = number * TOGETHER
        some = self.table.slice(first, TOGETHER)
        asked = list(last_prompts(some.to_pydict(), f"{self.uri} rows {first + 1} to {first + some.num_rows}"))
        ids = [found or [self.engine.start] for found in _tokens(asked, self.engine.tokenizer)]
        rooms = [self._room(len(i), f"{self.uri} row {first + n}") for n, i in enumerate(ids, start=1)]
        answers = self.engine.complete(ids, Sampling(max_tokens=max(rooms)))
        ended = [len(a) < room for a, room in zip(answers, rooms, strict=True)]
        texts = [self.engine.tokenizer.decode(a, skip_special_tokens=True) for a in answers]
        columns = {
            "prompt": pa.array([p for p, e in zip(asked, ended, strict=True) if e], TYPES[type(asked[0])]),
            "completion": pa.array([t for t, e in zip(texts, ended, strict=True) if e], pa.string()),
        }
        if SOURCE in some.column_names:
            columns[SOURCE] = some[SOURCE].combine_chunks().filter(pa.array(ended))
        return pa.table(columns).replace_schema_metadata({CUT: str(len(ended) - sum(ended))})

    def _room(self, asked: int, where: str) -> int:
        """How many tokens an answer to so many may have."""
        context = self.engine.context
        if context is not None and asked >= context:
            what = f"asks with {asked} tokens, expected fewer than the teacher's context of {context}"
            raise DatasetError(where, what, "Shorten it or remove it.")
        return self.max_answer if context is None else min(self.max_answer, context - asked)


def last_prompts(rows: Mapping[str, Sequence[Any]], where: str) -> Iterator[str | list[dict[str, str]]]:
    """What comes before the last answer of each row.

    Raises:
        DatasetError: A conversation has no turn of the assistant.
    """
    if "messages" not in rows:
        yield from rows[COLUMNS[Form.PROMPT_COMPLETION][0]]
        return
    for messages in rows["messages"]:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            what = "a conversation has no turn of the assistant, expected one to answer anew"
            raise DatasetError(where, what, "Remove it.")
        yield messages[: turns[-1]]


def _tokens(asked: Sequence[Any], tokenizer: Any) -> Iterator[list[int]]:
    """Prompts as the model is asked them: as a row has them that it learns, up to the answer."""
    for document in documents({"prompt": asked, "completion": [""] * len(asked)}, tokenizer):
        yield [token for token, learnt in zip(document.ids, document.answer, strict=True) if not learnt]


def answered(
    work: Workspace, teacher: Path, sets: Mapping[str, Dataset], *, max_answer: int, precision: str
) -> tuple[Workspace, dict[str, Dataset], dict[str, int]]:
    """Have a teacher answer the prompts of several sets, once for all attempts at the step.

    Returns:
        The workspace of what follows, whose checkpoints carry the answers along; the answered sets by name; and how
        many answers were cut and so left out, as ``cut_answers``.
    """
    found: dict[str, Dataset] = {}
    cut = 0
    for name, data in sets.items():
        file = work.scratch / f"{name}.parquet"
        kept = work.kept()
        if kept is not None and (kept / file.name).is_file():
            shutil.copyfile(kept / file.name, file)
        else:
            write_answers(work, teacher, data, file, max_answer=max_answer, precision=precision, name=name)
        cut += counted(file)["cut"]
        found[name] = Dataset(str(file))
        work = cast(Workspace, _Following(work, file))
    return work, found, {"cut_answers": cut}


class _Following:
    """The workspace of a step that goes on from a file that it wrote: its checkpoints carry that along."""

    def __init__(self, work: Workspace, file: Path) -> None:
        self._work, self._file = work, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def keep(self, folder: Path) -> None:
        """See `Workspace`."""
        shutil.copyfile(self._file, folder / self._file.name)
        self._work.keep(folder)

    def kept(self) -> Path | None:
        """See `Workspace`; what was kept while the file was written is nothing to go on from."""
        kept = self._work.kept()
        return kept if kept is not None and (kept / self._file.name).is_file() else None
