"""The verb `evaluate`: what a model's answers cost it, and how near its own come, document by document."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lfm.errors import LfmError
from operators.artifact import Adapter, Dataset, Metrics, Model
from operators.base import operator
from operators.batches import IGNORED, Document, documents, on_device, packed
from operators.engines.native import Native, Sampling
from operators.language_models import adapted, check, head_of, load, load_tokenizer
from operators.objectives import answers, plain
from operators.rows import read_rows
from operators.workspace import Workspace

SUMMARY, DOCUMENTS = "metrics.json", "documents.parquet"


class BaseNeeded(LfmError, ValueError):
    """An adapter without the model that it belongs to, or with another."""

    def __init__(self, verb: str, got: str, wanted: str) -> None:
        super().__init__(verb, got, wanted)
        self.verb, self.got, self.wanted = verb, got, wanted

    def __str__(self) -> str:
        return (
            f"{self.verb}: the adapter's base is {self.wanted[:12] or 'unknown'}, got {self.got[:12] or 'none'}. "
            "Give the model that it was trained on as 'base'."
        )


@operator()
def evaluate(
    work: Workspace,
    *,
    model: Model | Adapter,
    base: Model | None = None,
    data: Mapping[str, Dataset],
    length: int = 512,
    batch_size: int = 32,
    max_documents: int | None = None,
    generate: int = 0,
) -> Metrics:
    """Measure a model on held-out sets.

    For each set: the mean loss of an answer token and its perplexity; with `generate`, greedy answers to the prompts
    and their exact matches and chrF. Every number is kept for each document, so that models can be compared in pairs.

    Args:
        work: The step's workspace.
        model: What is measured.
        base: What `model` was trained on, where it is an adapter.
        data: The sets by name.
        length: Tokens of a row; of a longer document every piece counts.
        batch_size: Rows at once.
        max_documents: Only so many of each set, the first ones.
        generate: The most tokens of an answer; 0 generates none.

    Raises:
        BaseNeeded: An adapter came without its base.
    """
    whole, home = opened(model, base)
    check(plain(whole), packed=False)
    device = torch.device("cuda" if work.resources.gpus else "cpu")
    engine = Native(whole.to(device), load_tokenizer(home))
    summary: dict[str, Any] = {}
    tables = []
    for done, (name, dataset) in enumerate(data.items()):
        rows = read_rows(dataset).slice(0, max_documents).to_pydict()
        columns = losses(engine, documents(rows, engine.tokenizer), length=length, batch_size=batch_size, name=name)
        summary[name] = {"documents": len(columns["loss"]), **_mean_loss(columns)}
        if generate and "text" not in rows:
            columns |= scores(engine, rows, generate, batch_size)
            summary[name] |= {k: float(np.mean(columns[k])) for k in ("exact_match", "chrf")}
        tables.append(pa.table({"set": [name] * len(columns["loss"]), **columns}))
        work.progress(done + 1, len(data), **{f"{name}_loss": summary[name]["loss"]})
    folder = work.scratch / "metrics"
    folder.mkdir()
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2))
    pq.write_table(pa.concat_tables(tables, promote_options="default"), folder / DOCUMENTS)
    return work.save(Metrics, folder, {"sets": summary, "parameters": sum(p.numel() for p in whole.parameters())})


def opened(model: Model | Adapter, base: Model | None) -> tuple[Any, Path]:
    """A model, or an adapter on its base, and the folder with its tokenizer."""
    if isinstance(model, Model):
        return load(model.path, torch.float32), model.path
    wanted = str(model.about.get("base", ""))
    if base is None or (wanted and base.digest and wanted != base.digest):
        raise BaseNeeded("evaluate", base.digest if base else "", wanted)
    return adapted(base.path, model.path, torch.float32), base.path


@torch.inference_mode()
def losses(
    engine: Native, found: Iterator[Document], *, length: int, batch_size: int, name: str
) -> dict[str, list[float]]:
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
    head = head_of(engine.model)
    sums, tokens = np.zeros(count), np.zeros(count)
    for start in range(0, len(rows), batch_size):
        where = np.arange(start, min(len(rows), start + batch_size))
        batch = on_device(rows, where, device)
        hidden, targets = answers(engine.model, batch, packed=False)
        logits = head.shaped(head.linear(hidden)).float()
        each: Tensor = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        row = (batch.targets != IGNORED).nonzero()[:, 0].cpu().numpy()
        documents_of = np.array([owner[longest_last[start + r]] for r in row])
        np.add.at(sums, documents_of, each.double().cpu().numpy())
        np.add.at(tokens, documents_of, 1)
    return {"loss": sums.tolist(), "tokens": tokens.tolist()}


def scores(engine: Native, rows: Mapping[str, Sequence[Any]], max_tokens: int, batch_size: int) -> dict[str, list[Any]]:
    """For each document a greedy answer, whether it is the expected one, and its chrF in [0, 1]."""
    import sacrebleu

    asked, expected = prompts(rows, engine.tokenizer)
    by_length = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    said = [""] * len(asked)
    for start in range(0, len(asked), batch_size):
        chosen = by_length[start : start + batch_size]
        for i, ids in zip(
            chosen, engine.complete([asked[i] for i in chosen], Sampling(max_tokens=max_tokens)), strict=True
        ):
            said[i] = engine.tokenizer.decode(ids, skip_special_tokens=True).strip()
    chrf = sacrebleu.CHRF()
    pairs = list(zip(said, expected, strict=True))
    return {
        "answer": said,
        "exact_match": [float(a == e) for a, e in pairs],
        "chrf": [chrf.sentence_score(a, [e]).score / 100 for a, e in pairs],
    }


def prompts(rows: Mapping[str, Sequence[Any]], tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """What to answer, as token ids, and the expected answers: the last turn of each row."""
    asked, expected = [], []
    for document, wanted in zip(documents(rows, tokenizer), _wanted(rows), strict=True):
        last = len(document.answer) - 1
        while last >= 0 and document.answer[last]:
            last -= 1
        asked.append(list(document.ids[: last + 1]))
        expected.append(wanted.strip())
    return asked, expected


def _wanted(rows: Mapping[str, Sequence[Any]]) -> list[str]:
    if "messages" in rows:
        return [m[-1]["content"] for m in rows["messages"]]
    return [c if isinstance(c, str) else c[-1]["content"] for c in rows["completion"]]


def _mean_loss(columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    mean = float(np.sum(columns["loss"]) / np.sum(columns["tokens"]))
    return {"loss": mean, "perplexity": float(np.exp(mean)), "tokens": float(np.sum(columns["tokens"]))}
