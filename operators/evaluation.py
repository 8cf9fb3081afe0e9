"""The verb `evaluate`: what a model's answers cost it, and how near its own come, document by document."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lfm.errors import HyperparameterError, LfmError
from lfm.meta.base import Meta
from operators.artifact import Adapter, Artifact, Dataset, Datastore, Delta, Memory, Metrics, Model, kind_of
from operators.base import operator
from operators.data.episodes import FewShot
from operators.data.facts import holds_facts, inherited, read_facts
from operators.data.rows import COLUMNS, columns_of
from operators.footprint import Footprint
from operators.learning.memory import answering
from operators.measures.accuracy import labels_told
from operators.measures.answers import Answers
from operators.measures.edit_scores import CARRIED_FACTS, Facts
from operators.measures.few_shot import Adapted, unmeasurable
from operators.measures.measure import DOCUMENTS, SUMMARY, Measure
from operators.models import classifiers
from operators.models.changed_models import CHANGES, beside, home_of, not_whole, opened, without_base
from operators.models.datastore_files import not_beside, not_both, unfit as unfit_datastore
from operators.models.ensemble_files import is_ensemble
from operators.models.language_models import CALLED, architecture_of
from operators.models.memory_files import unfit as unfit_memory
from operators.models.texts import forms_for, unfit
from operators.resources import Resources
from operators.training import Training
from operators.workspace import Workspace

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


def _footprint(
    *,
    model: Model | Adapter | Delta | None,
    base: Model | None,
    method: Meta | None,
    length: int,
    batch_size: int,
    resources: Resources,
    **_: object,
) -> Footprint | None:
    """What reading the documents takes, which is no less than writing does; None of what is no plain decoder."""
    home = home_of(model, base)
    if home is None or method is not None or is_ensemble(home) or architecture_of(home) != "decoder":
        return None
    return answering(home, rows=batch_size, length=length, precision="float32", gpus=resources.gpus)


@operator(problems=_foreseen, takes_ensembles=("model",), footprint=_footprint)
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


def _of_facts(dataset: Dataset | None) -> bool:
    """Whether its rows are facts, by their columns; not where these cannot be read, which others say."""
    try:
        return dataset is not None and holds_facts(columns_of(dataset.uri))
    except LfmError:
        return False
