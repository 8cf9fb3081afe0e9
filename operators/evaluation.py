"""The verb `evaluate`: what a model's answers cost it, and how near its own come, document by document."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lfm.chunks import chunk_size
from lfm.errors import HyperparameterError, LfmError
from lfm.meta.base import Meta
from operators.artifact import Adapter, Artifact, Dataset, Datastore, Delta, Memory, Metrics, Model, kind_of
from operators.base import operator
from operators.data.batches import IGNORED, Document, documents, on_device, packed
from operators.data.episodes import FewShot
from operators.data.facts import holds_facts, inherited, read_facts
from operators.data.row_files import DatasetError
from operators.data.rows import COLUMNS, SPOKEN, columns_of, digest_of, read_rows
from operators.engines.consulting import consulting
from operators.engines.native import Native, Sampling
from operators.measures.accuracy import labels_told
from operators.measures.edit_scores import CARRIED_FACTS, Facts
from operators.measures.few_shot import Adapted, unmeasurable
from operators.models import classifiers
from operators.models.changed_models import CHANGES, beside, home_of, not_whole, opened, without_base
from operators.models.datastore_files import not_beside, not_both, unfit as unfit_datastore
from operators.models.language_models import CALLED, architecture_of, check, load_tokenizer
from operators.models.memory_files import unfit as unfit_memory
from operators.models.objectives import plain
from operators.models.texts import check_length, forms_for, unfit
from operators.training import Training
from operators.workspace import Workspace

SUMMARY, DOCUMENTS = "metrics.json", "documents.parquet"
GENERATED = ("exact_match", "chrf")
USUAL = FewShot()


def _foreseen(
    *,
    model: Model | Adapter | Delta | None,
    base: Model | None,
    memory: Memory | None = None,
    datastore: Datastore | None = None,
    data: Mapping[str, Dataset | None],
    kinds: Mapping[str, Sequence[type[Artifact]]],
    length: int = 512,
    batch_size: int = 32,
    max_documents: int | None = None,
    generate: int = 0,
    method: Meta | None = None,
    few_shot: FewShot = USUAL,
    episodes: int = 0,
    seed: int = 0,
    **others: object,
) -> Iterator[str]:
    if lonely := without_base(kinds):
        yield lonely
    if memory is not None:
        uri = memory.uri
        yield from (str(not_whole(uri, kind_of(k))) for k in kinds["model"] if k in CHANGES)
        yield from map(str, unfit_memory(memory, model if isinstance(model, Model) else None))
    yield from map(str, _unfit_datastore(datastore, model, kinds))
    yield from map(str, _out_of_range(length, batch_size, max_documents, generate, method, episodes))
    if not data:
        yield "evaluate: data is empty, expected at least one set with a name. Write it as data: {name: set}."
    if CARRIED_FACTS in data:
        yield f"evaluate: data {CARRIED_FACTS!r}, expected another name: the model's own facts have it. Rename the set."
    home = home_of(model, base)
    if method is not None:
        given = {"max_documents": max_documents is not None, "generate": generate > 0}
        adapter = model if isinstance(model, Adapter) else None
        beside_it = [name for name, is_given in given.items() if is_given]
        yield from unmeasurable(home, adapter, kinds, method, few_shot, data, length=max(2, length), others=beside_it)
        return
    if few_shot != USUAL or seed:
        what = "ways, shots, queries or seed: given without a method"
        yield f"{what}, expected one that adapts to episodes. Leave them out."
    facts = [name for name, dataset in data.items() if _of_facts(dataset)]
    named = {f"data {name!r}": dataset for name, dataset in data.items() if name not in facts}
    yield from unfit(Training(length=max(2, length)), home, named)
    if home is not None and (what := architecture_of(home)) != "decoder":
        if what == "encoder":
            yield f"model: {str(home)!r} is an encoder: {classifiers.HEADLESS}. {classifiers.GIVE_HEAD}"
        if "datastore" in kinds:
            yield f"datastore: given with {CALLED[what]}, expected a decoder, which tells tokens. Leave it out."
        if generate > 0:
            yield f"generate={generate}, expected 0 for {CALLED[what]}, which writes nothing. Leave it out."
        wanted = " and ".join(COLUMNS[forms_for(what)[0]])
        yield from (f"data {n!r}: facts, expected rows of {wanted} for {CALLED[what]}. Give others." for n in facts)


def _unfit_datastore(
    datastore: Datastore | None, model: Artifact | None, kinds: Mapping[str, Sequence[type[Artifact]]]
) -> Iterator[LfmError]:
    """Why a datastore is not to be used with what else is given, as far as is known."""
    if "datastore" not in kinds:
        return
    if "memory" in kinds:
        yield not_both("evaluate")
    for problem in map(not_beside, kinds["model"]):
        if problem is not None:
            yield problem
    if datastore is not None:
        yield from unfit_datastore("evaluate", datastore, model if isinstance(model, Model) else None)


def _out_of_range(
    length: int, batch_size: int, max_documents: int | None, generate: int, method: Meta | None, episodes: int
) -> Iterator[HyperparameterError]:
    measured = episodes == 0 if method is None else episodes >= 2
    for holds, field, value, allowed in (
        (length >= 2, "length", length, "length >= 2"),
        (batch_size >= 1, "batch_size", batch_size, "batch_size >= 1"),
        (max_documents is None or max_documents >= 1, "max_documents", max_documents, "max_documents >= 1 or none"),
        (generate >= 0, "generate", generate, "generate >= 0"),
        (measured, "episodes", episodes, "episodes >= 2 with a method that adapts to them, and 0 without"),
    ):
        if not holds:
            yield HyperparameterError("evaluate", field, value, allowed)


@operator(problems=_foreseen, takes_ensembles=("model",))
def evaluate(
    work: Workspace,
    *,
    model: Model | Adapter | Delta,
    base: Model | None = None,
    memory: Memory | None = None,
    datastore: Datastore | None = None,
    data: Mapping[str, Dataset],
    method: Meta | None = None,
    few_shot: FewShot = USUAL,
    episodes: int = 0,
    seed: int = 0,
    length: int = 512,
    batch_size: int = 32,
    max_documents: int | None = None,
    generate: int = 0,
    carried: bool = True,
) -> Metrics:
    """Measure a model on held-out sets.

    For each set: the mean loss of an answer token and its perplexity; with `generate`, greedy answers to the prompts
    and their exact matches and chrF, both in [0, 1]; sets of text have no prompts and none of that. Of a set of facts
    what `operators.measures.edit_scores` measures. Of a classifier of texts or a network for images: the mean loss of a
    label, and the share of labels that it gets right. Every number is kept for each document, so that models can be
    compared in pairs.

    With a `method` of meta-learning the documents are episodes instead: the model adapts to the support of each, and is
    measured on its query, whatever labels it knew before. Beside the mean accuracy stands half the width of its 95 %
    confidence interval over episodes.

    Args:
        work: The step's workspace.
        model: What is measured; a change of weights without a model being written.
        base: What `model` was made for, where it is an adapter or a change; and what it is compared with where facts
            have neighbours. There a model with a memory or a datastore is compared with itself alone, unless another
            base is given.
        memory: What the model consults while it answers.
        datastore: Of this model: what it says is mixed with what followed in similar places. Not with a memory.
        data: The sets by name.
        method: What adapts the model, a network or an adapter of LoRA, to each episode. A network that tells another
            number of labels than `ways` gets a new head.
        few_shot: What an episode is made of.
        episodes: How many are drawn from each set.
        seed: Decides which these are, and the new head.
        length: Tokens of a row. A longer document is cut into pieces: each counts, but for its first token, which
            nothing comes before. A document without an answer token has no loss and weighs nothing. A classifier
            sees the first piece alone, and so does a model in an episode.
        batch_size: Rows at once; an episode's support, and its query, are whole.
        max_documents: Only so many of each set, the first ones.
        generate: The most tokens of an answer, and of the text whose fluency is measured; 0 generates none.
        carried: Also measure the facts that the model and all that it was made from were given, as the set
            ``carried facts``: whether an edit has been lost on the way. Not in episodes.

    Raises:
        HyperparameterError: A parameter is out of range, or `length` beyond what the model is made for.
        BaseNeeded: An adapter or a change came without its base.
        OtherMemory: The memory was not made for this very model.
        OtherModel: The datastore was not.
        DatastoreError: It cannot be read, or is given with a memory or with a change of weights.
        AnotherVocabulary: `base` has other tokens than the model, and there are facts to compare them on.
        NoLossToken: A set has no answer token at all.
        DatasetError: Rows are not of a form that the model knows, or something is asked of it by a document that has
            no answer.
        UnknownName: A label is none of the classifier's.
        UnsupportedModel: The model has no head for labels, cannot be asked so, or has nothing that adapts.
    """
    for problem in _out_of_range(length, batch_size, max_documents, generate, method, episodes):
        raise problem
    given = {"model": model, "memory": memory, "datastore": datastore}
    for unusable in _unfit_datastore(datastore, model, {k: (type(v),) for k, v in given.items() if v is not None}):
        raise unusable
    whole, home = opened("evaluate", model, base, memory)
    device = torch.device(work.resources.device)
    whole.to(device)
    sets: dict[str, tuple[Measure, Any]] = {}
    if method is not None:
        adapted = Adapted(whole, home, method, few_shot, episodes=episodes, seed=seed, length=length)
        sets = {name: (adapted, adapted.read(dataset)) for name, dataset in data.items()}
    elif architecture_of(home) != "decoder":
        labels = labels_told(whole, home, length=length, batch_size=batch_size)
        sets = {name: (labels, labels.read(dataset, max_documents)) for name, dataset in data.items()}
    else:
        answered = Answers(whole, home, datastore, length=length, batch_size=batch_size, max_tokens=generate)
        facts = {name: read_facts(dataset)[:max_documents] for name, dataset in data.items() if _of_facts(dataset)}
        spoken = {name: answered.read(d, max_documents) for name, d in data.items() if name not in facts}
        if carried and (own := inherited([home, model.path, *([memory.path] if memory else [])])):
            facts[CARRIED_FACTS] = own
        helped = memory is not None or datastore is not None
        alone = base or (model if helped and isinstance(model, Model) else None)
        other = beside(whole, home, alone).to(device) if alone and facts else None
        known = Facts(answered.engine, other, batch_size=batch_size, max_tokens=generate)
        sets = {name: (answered, rows) for name, rows in spoken.items()}
        sets |= {name: (known, rows) for name, rows in facts.items()}
    total = sum(measure.work(rows) for measure, rows in sets.values())
    done = 0

    def told(number: int, **measures: float) -> None:
        nonlocal done
        done += number
        work.progress(done, total, **measures)

    summary: dict[str, dict[str, Any]] = {}
    tables = []
    for name, (measure, rows) in sets.items():
        columns, means = measure.measured(name, rows, told)
        number = len(next(iter(columns.values())))
        summary[name] = {"documents": number, "digest": measure.digest(rows), **means}
        tables.append(pa.table({"set": [name] * number, **columns}))
    about = {"sets": summary, "generate": generate, "parameters": sum(p.numel() for p in whole.parameters())}
    folder = work.scratch / "metrics"
    folder.mkdir()
    (folder / SUMMARY).write_text(json.dumps(about, indent=2))
    pq.write_table(pa.concat_tables(tables, promote_options="default"), folder / DOCUMENTS)
    return work.save(Metrics, folder, about)


class Measure(Protocol):
    """What can be measured of one kind of model, on one kind of rows."""

    def work(self, rows: Any) -> int:
        """How many times it tells of a row that it is done."""

    def digest(self, rows: Any) -> str:
        """Of what rows ask and expect, so that two results can be known to be about the same documents."""

    def measured(self, name: str, rows: Any, told: Callable[..., None]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """A set's numbers for each document, and their means."""


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
        """See `Measure`."""
        return len(next(iter(rows.values()))) * (2 if self._asks(rows) else 1)

    def digest(self, rows: Mapping[str, Sequence[Any]]) -> str:
        """See `Measure`."""
        return digest_of(rows)

    def measured(
        self, name: str, rows: Mapping[str, Sequence[Any]], told: Callable[..., None]
    ) -> tuple[dict[str, list[Any]], dict[str, float]]:
        """See `Measure`."""
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
    size = chunk_size(engine.head.size)
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


def _of_facts(dataset: Dataset | None) -> bool:
    """Whether its rows are facts, by their columns; not where these cannot be read, which others say."""
    try:
        return dataset is not None and holds_facts(columns_of(dataset.uri))
    except LfmError:
        return False


def _mean_loss(columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    mean = float(np.sum(columns["loss"]) / np.sum(columns["tokens"]))
    return {"loss": mean, "perplexity": float(np.exp(mean)), "tokens": int(np.sum(columns["tokens"]))}
