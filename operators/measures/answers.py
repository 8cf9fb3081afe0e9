"""What a language model's answers cost it, and how near its own come, document by document."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm.chunks import chunk_size
from operators.artifact import Dataset, Datastore
from operators.data.batches import IGNORED, Document, documents, on_device, packed
from operators.data.row_files import DatasetError
from operators.data.rows import SPOKEN, digest_of, read_rows
from operators.engines.consulting import consulting
from operators.engines.native import Native, Sampling
from operators.models.language_models import check, load_tokenizer
from operators.models.objectives import plain
from operators.models.texts import check_length

GENERATED = ("exact_match", "chrf")


class Answers:
    """What a language model's answer tokens cost it, and how near its own answers come to them."""

    def __init__(
        self,
        model: Any,
        home: Path,
        datastore: Datastore | None = None,
        *,
        length: int,
        batch_size: int,
        max_tokens: int,
    ) -> None:
        check(plain(model), packed=False)
        self.engine = consulting(model, load_tokenizer(home), datastore)
        self.length, self.batch_size, self.max_tokens = length, batch_size, max_tokens
        check_length("evaluate", length, self.engine.context)

    def read(self, dataset: Dataset, max_documents: int | None) -> Mapping[str, Sequence[Any]]:
        """A set's documents, only so many."""
        return dict(read_rows(dataset, forms=SPOKEN).slice(0, max_documents).to_pydict())

    def work(self, rows: Mapping[str, Sequence[Any]]) -> int:
        """See `operators.measures.measure.Measure`."""
        return len(next(iter(rows.values()))) * (2 if self._asks(rows) else 1)

    def digest(self, rows: Mapping[str, Sequence[Any]]) -> str:
        """See `operators.measures.measure.Measure`."""
        return digest_of(rows)

    def measured(
        self, name: str, rows: Mapping[str, Sequence[Any]], told: Callable[..., None]
    ) -> tuple[dict[str, list[Any]], dict[str, float]]:
        """See `operators.measures.measure.Measure`."""
        found = documents(rows, self.engine.tokenizer)
        columns = losses(self.engine, found, length=self.length, batch_size=self.batch_size, name=name)
        means = _mean_loss(columns)
        told(len(columns["loss"]), **{f"{name}_loss": means["loss"]})
        if self._asks(rows):
            columns |= scores(self.engine, rows, self.max_tokens, self.batch_size, name=name, told=told)
            means |= {k: float(np.mean(columns[k])) for k in GENERATED}
        return columns, means

    def _asks(self, rows: Mapping[str, Sequence[Any]]) -> bool:
        """Whether answers are generated: text has no prompts."""
        return bool(self.max_tokens) and "text" not in rows


@torch.inference_mode()
def losses(
    engine: Native, found: Iterator[Document], *, length: int, batch_size: int, name: str
) -> dict[str, list[Any]]:
    """For each document the summed loss of its answer tokens and their number."""
    pieces: list[Document] = []
    owner: list[int] = []
    count = 0
    for number, document in enumerate(found):
        count += 1
        for start in range(0, len(document.ids), length):
            piece = Document(document.ids[start : start + length], document.answer[start : start + length])
            if any(piece.answer[1:]):
                pieces.append(piece)
                owner.append(number)
    longest_last = sorted(range(len(pieces)), key=lambda i: len(pieces[i].ids))  # rows of a batch are alike in length
    rows = packed(
        (pieces[i] for i in longest_last),
        length=length,
        padding=engine.tokenizer.pad_token_id,
        packing=False,
        where=name,
    )
    device = next(engine.model.parameters()).device
    sums, tokens = np.zeros(count), np.zeros(count, np.int64)
    size = chunk_size(engine.head.size, device)
    for start in range(0, len(rows), batch_size):
        where = np.arange(start, min(len(rows), start + batch_size))
        batch = on_device(rows, where, device)
        read, targets = engine.answers(batch)
        each = [engine.losses(read[at : at + size], targets[at : at + size]) for at in range(0, len(targets), size)]
        row = (batch.targets != IGNORED).nonzero()[:, 0].cpu().numpy()
        documents_of = np.array([owner[longest_last[start + r]] for r in row])
        np.add.at(sums, documents_of, torch.cat(each).double().cpu().numpy())
        np.add.at(tokens, documents_of, 1)
    return {"loss": sums.tolist(), "tokens": tokens.tolist()}


def scores(
    engine: Native,
    rows: Mapping[str, Sequence[Any]],
    max_tokens: int,
    batch_size: int,
    *,
    name: str,
    told: Callable[[int], None],
) -> dict[str, list[Any]]:
    """For each document a greedy answer, whether it is the expected one, and its chrF in [0, 1]."""
    import sacrebleu

    asked, expected = prompts(rows, engine, name)
    by_length = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    said = [""] * len(asked)
    for start in range(0, len(asked), batch_size):
        chosen = by_length[start : start + batch_size]
        answered = engine.complete([asked[i] for i in chosen], Sampling(max_tokens=max_tokens))
        for i, ids in zip(chosen, answered, strict=True):
            said[i] = engine.tokenizer.decode(ids, skip_special_tokens=True).strip()
        told(len(chosen))
    chrf = sacrebleu.CHRF()
    pairs = list(zip(said, expected, strict=True))
    return {
        "answer": said,
        "exact_match": [float(a == e) for a, e in pairs],
        "chrf": [chrf.sentence_score(a, [e]).score / 100 for a, e in pairs],
    }


def prompts(rows: Mapping[str, Sequence[Any]], engine: Native, name: str) -> tuple[list[list[int]], list[str]]:
    """What to answer, as token ids, and the expected answers: the last one of each row."""
    asked, expected = [], []
    for i, (document, wanted) in enumerate(zip(documents(rows, engine.tokenizer), _wanted(rows), strict=True)):
        if wanted is None:
            what = "has no turn of the assistant, expected one to compare with"
            raise DatasetError(f"set {name!r} document {i + 1}", what, "Remove it, or set generate to 0.")
        last = len(document.answer) - 1
        while last >= 0 and document.answer[last]:
            last -= 1
        prompt = list(document.ids[: last + 1]) or [engine.start]
        if engine.context is not None and len(prompt) >= engine.context:
            what = f"asks with {len(prompt)} tokens, expected fewer than the model's context of {engine.context}"
            raise DatasetError(f"set {name!r} document {i + 1}", what, "Shorten it, or set generate to 0.")
        asked.append(prompt)
        expected.append(wanted.strip())
    return asked, expected


def _wanted(rows: Mapping[str, Sequence[Any]]) -> Iterator[str | None]:
    for said in rows["messages"] if "messages" in rows else rows["completion"]:
        if isinstance(said, str):
            yield said
        else:
            yield next((m["content"] for m in reversed(said) if m["role"] == "assistant"), None)


def _mean_loss(columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    mean = float(np.sum(columns["loss"]) / np.sum(columns["tokens"]))
    return {"loss": mean, "perplexity": float(np.exp(mean)), "tokens": int(np.sum(columns["tokens"]))}
