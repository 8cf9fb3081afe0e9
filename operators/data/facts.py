"""Facts that a model shall say: their rows, their tokens, and the file in which later models carry them along."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lfm.editing.base import Fact, Prompt
from operators.artifact import CARRIED, Dataset
from operators.data.batches import opening
from operators.data.python_corpus import PYTHON, corpus
from operators.data.records import header, records
from operators.data.row_files import DatasetError, files_of

COLUMNS = ("subject", "prompt", "target")
OPTIONAL = ("true", "paraphrases", "neighbours")
ESSENCE = "{} is a"  # what ROME asks, so that what the subject is stays as it was


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A prompt whose answer shall stay what it is.

    Attributes:
        prompt: What is asked.
        answer: What is right; empty where only a change of what the model says can be seen.
    """

    prompt: str
    answer: str = ""


@dataclass(frozen=True, slots=True)
class FactRow:
    """One fact, as text.

    Attributes:
        subject: What it is about; it stands in `prompt`.
        prompt: What the model is asked, which `target` continues.
        target: What it shall say.
        true: What it says before, or what is right; empty where nobody says so.
        paraphrases: Other prompts with the same answer.
        neighbours: Prompts about something else.
    """

    subject: str
    prompt: str
    target: str
    true: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


def holds_facts(columns: Iterable[str]) -> bool:
    """Whether rows with such columns are facts."""
    return set(COLUMNS) <= set(columns)


def read_facts(dataset: Dataset) -> list[FactRow]:
    """All facts of Parquet, JSON lines or an array, or of a corpus of Python.

    Raises:
        DatasetError: It cannot be read, has no rows, or has one that is no fact.
        UnknownName: Python has no such corpus.
    """
    if dataset.uri.startswith(PYTHON):
        return list(_of_corpus(dataset.uri))
    return _read(files_of(Path(dataset.uri), None), dataset.uri)


def _of_corpus(uri: str) -> Iterator[FactRow]:
    columns = corpus(uri.removeprefix(PYTHON))
    _check_columns(uri, columns)
    for number, values in enumerate(zip(*columns.values(), strict=True), 1):
        yield _fact(dict(zip(columns, values, strict=True)), f"{uri} row {number}")


def _read(files: Sequence[Path], where: str) -> list[FactRow]:
    found: list[FactRow] = []
    for file in files:
        _check_columns(str(file), header(file))
        found += [_fact(record, at) for at, record in records(file, {*COLUMNS, *OPTIONAL})]
    if not found:
        raise DatasetError(where, "has no rows, expected at least one fact", "Give a file with something in it.")
    return found


def _check_columns(where: str, columns: Collection[str]) -> None:
    if columns and not holds_facts(columns):
        what = f"has the columns {', '.join(map(repr, columns))}, expected 'subject', 'prompt' and 'target'"
        raise DatasetError(where, what, "Rename the columns.")


def _fact(record: Mapping[str, Any], where: str) -> FactRow:
    texts = {name: _text(record.get(name), name, where, empty=False) for name in COLUMNS}
    if texts["subject"] not in texts["prompt"]:
        what = f"its prompt {texts['prompt']!r} does not hold the subject {texts['subject']!r}, expected it to"
        raise DatasetError(where, what, "Write the subject as the prompt does.")
    paraphrases = record.get("paraphrases") or ()
    neighbours = record.get("neighbours") or ()
    return FactRow(
        **texts,
        true=_text(record.get("true") or "", "true", where, empty=True),
        paraphrases=tuple(_text(p, "paraphrases", where, empty=False) for p in paraphrases),
        neighbours=tuple(_neighbour(n, where) for n in neighbours),
    )


def _neighbour(value: object, where: str) -> Neighbour:
    if isinstance(value, str):
        return Neighbour(_text(value, "neighbours", where, empty=False))
    if isinstance(value, Mapping):
        prompt = _text(value.get("prompt"), "neighbours", where, empty=False)
        return Neighbour(prompt, _text(value.get("answer") or "", "neighbours", where, empty=True))
    raise DatasetError(where, f"'neighbours' holds {value!r}, expected prompts, each with its answer", "Correct it.")


def _text(value: object, column: str, where: str, *, empty: bool) -> str:
    if isinstance(value, str) and (empty or value.strip()):
        return value
    what = f"{column!r} is {value!r}, expected a string that is not empty"
    raise DatasetError(where, what, "Correct the row or remove it.")


def continued(prompt: str, answer: str) -> str:
    """A prompt and what follows it, with a space between them unless one of them has it."""
    return f"{prompt}{answer}" if prompt[-1:].isspace() or answer[:1].isspace() else f"{prompt} {answer}"


def spoken(prompt: str, answer: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, with what opens a text, and those of its answer, as one text has them.

    Raises:
        DatasetError: A token reaches over the edge between the two.
    """
    whole = tokenizer(continued(prompt, answer), add_special_tokens=False, return_offsets_mapping=True)
    edge = len(prompt.rstrip())
    before = [end <= edge for _, end in whole["offset_mapping"]]
    asked = sum(before)
    alone = tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"]
    if list(whole["input_ids"][:asked]) != list(alone):
        what = f"in {continued(prompt, answer)!r} a token reaches over the end of the prompt, expected an edge there"
        raise DatasetError("facts", what, "Let the prompt end with a whole word.")
    return [*opening(tokenizer), *alone], list(whole["input_ids"][asked:])


def asking(prompt: str, subject: str, tokenizer: Any) -> Prompt:
    """A prompt as an editor takes it; the subject is its last mention."""
    begin = prompt.rindex(subject)
    end = begin + len(subject)
    whole = tokenizer(prompt.rstrip(), add_special_tokens=False, return_offsets_mapping=True)
    inside = [i for i, (a, b) in enumerate(whole["offset_mapping"]) if a < end and b > begin and b > a]
    first = opening(tokenizer)
    ids = torch.tensor([*first, *whole["input_ids"]])
    return Prompt(ids, (len(first) + inside[0], len(first) + inside[-1] + 1))


def tokenized(row: FactRow, tokenizer: Any, contexts: Sequence[str] = ()) -> Fact:
    """One fact as an editor takes it.

    Args:
        row: The fact.
        tokenizer: The model's.
        contexts: Texts that the prompt is also put behind, with a space between.
    """
    prompts = [row.prompt, *(continued(text, row.prompt) for text in contexts)]
    return Fact(
        prompts=tuple(asking(text, row.subject, tokenizer) for text in prompts),
        target=torch.tensor(spoken(row.prompt, row.target, tokenizer)[1]),
        essence=asking(ESSENCE.format(row.subject), row.subject, tokenizer),
    )


def carried(folder: Path) -> list[FactRow]:
    """The facts that a model or a change of one was given by itself and by all that it was made from; often none."""
    file = folder / CARRIED
    return _read([file], str(file)) if file.is_file() else []


def inherited(sources: Iterable[Path], facts: Sequence[FactRow] = ()) -> list[FactRow]:
    """The facts of all that something was made from, and its own: of two of one prompt the later one."""
    rows = [*(row for source in sources for row in carried(source)), *facts]
    return list({row.prompt: row for row in rows}.values())


def carry(sources: Iterable[Path], folder: Path, facts: Sequence[FactRow] = ()) -> None:
    """Write into `folder` what it has `inherited`.

    So an evaluation of what comes much later can tell whether an edit has been lost on the way.
    """
    rows = inherited(sources, facts)
    if rows:
        (folder / CARRIED).write_text("".join(f"{line}\n" for line in _lines(rows)))


def _lines(rows: Iterable[FactRow]) -> Iterator[str]:
    return (json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) for row in rows)
