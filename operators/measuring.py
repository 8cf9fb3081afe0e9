"""The verb `measure`: what several methods need to know of a model, computed by one pass over data and kept."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm.errors import HyperparameterError, LfmError
from lfm.statistics import FISHER, GRAM, KINDS, TOKENS_PER_WIDTH, Fisher, Gram, Labels, Modules, Statistic
from lfm.weights import Weights
from operators.artifact import Adapter, Artifact, Dataset, Model, Statistics
from operators.base import operator
from operators.data.batches import Rows
from operators.data.classes import numbered
from operators.data.rows import Form, read_rows
from operators.measures.observing import PARTS, Pass, Sums, lay_down, observed
from operators.models import classifiers
from operators.models.changed_models import home_of, home_with, without_base
from operators.models.language_models import CALLED, UnsupportedModel, architecture_of, load_tokenizer, outline
from operators.models.networks import is_network
from operators.models.texts import packed_rows, unfit
from operators.resources import Resources
from operators.training import Training
from operators.workspace import Workspace

STEM = "statistics"
EIGEN_WIDTH = 2048  # beyond it a matrix's eigenvalues take longer than its sums do


def _foreseen(
    *,
    model: Model | Adapter | None,
    base: Model | None,
    data: Dataset | None,
    kinds: Mapping[str, Sequence[type[Artifact]]],
    resources: Resources,
    statistics: tuple[str, ...] = (FISHER,),
    labels: Labels = "sampled",
    modules: Modules = "keys",
    layers: tuple[int, ...] | None = None,
    max_rows: int | None = None,
    length: int = 512,
    batch_size: int = 16,
    seed: int = 0,
    **others: object,
) -> Iterator[str]:
    if lonely := without_base(kinds):
        yield lonely
    if resources.most > PARTS:
        yield f"workers={resources.spoken}, expected at most {PARTS}: there are so many parts of the rows. Lower it."
    yield from map(str, _out_of_range(statistics, layers, max_rows, length, batch_size, seed))
    folder = home_of(model, base)
    yield from unfit(Training(length=max(2, length)), folder, {"data": data}, _forms(folder, labels))
    if folder is not None and ((folder / "config.json").is_file() or is_network(folder)):
        yield from _beyond(folder, chosen(statistics, labels, modules, layers, seed))


def _out_of_range(
    statistics: tuple[str, ...],
    layers: tuple[int, ...] | None,
    max_rows: int | None,
    length: int,
    batch_size: int,
    seed: int,
) -> Iterator[HyperparameterError]:
    once = len(set(statistics)) == len(statistics) > 0 and set(statistics) <= set(KINDS)
    alone = layers is None or (GRAM in statistics and len(set(layers)) == len(layers) > 0)
    for holds, field, value, allowed in (
        (once, "statistics", statistics, f"one or more of {', '.join(KINDS)}, each once"),
        (alone, "layers", layers, f"none, or some layers, each once, with {GRAM!r} under statistics"),
        (max_rows is None or max_rows >= 1, "max_rows", max_rows, "max_rows >= 1 or none"),
        (length >= 2, "length", length, "length >= 2"),
        (batch_size >= 1, "batch_size", batch_size, "batch_size >= 1"),
        (seed >= 0, "seed", seed, "seed >= 0"),
    ):
        if not holds:
            yield HyperparameterError("measure", field, value, allowed)


def _beyond(folder: Path, statistics: Sequence[Statistic]) -> Iterator[str]:
    """What the model's config tells of it that a kind cannot measure, a clause each."""
    what = architecture_of(folder)
    if what == "network":
        yield f"model: {str(folder)!r} is {CALLED[what]}, expected a model of texts. Give another."
        return
    if what == "encoder":
        yield f"model: {str(folder)!r} is an encoder: {classifiers.HEADLESS}. {classifiers.GIVE_HEAD}"
        return
    for statistic in statistics:
        if isinstance(statistic, Gram):
            try:
                statistic.watched(outline(folder))
            except LfmError as problem:
                yield f"statistics: {problem}"
        elif isinstance(statistic, Fisher) and statistic.labels == "exact" and what == "decoder":
            fix = "Draw them: labels: sampled."
            yield f"labels='exact' of a model that tells tokens, expected 'sampled' or 'data' for one. {fix}"


def chosen(
    statistics: Sequence[str], labels: Labels, modules: Modules, layers: tuple[int, ...] | None, seed: int
) -> tuple[Statistic, ...]:
    """The kinds by their words, with what each takes of the parameters."""
    known: dict[str, Statistic] = {
        FISHER: Fisher(labels=labels, seed=seed),
        GRAM: Gram(modules=modules, layers=layers),
    }
    return tuple(known[kind] for kind in statistics if kind in known)


@operator(problems=_foreseen, shares_work=True)
def measure(
    work: Workspace,
    *,
    model: Model | Adapter,
    base: Model | None = None,
    data: Dataset,
    statistics: tuple[Literal["fisher", "gram"], ...] = ("fisher",),
    labels: Labels = "sampled",
    modules: Modules = "keys",
    layers: tuple[int, ...] | None = None,
    max_rows: int | None = None,
    length: int = 512,
    batch_size: int = 16,
    seed: int = 0,
) -> Statistics:
    """Measure what methods need to know of a model besides its weights, in float32, in one pass for all kinds.

    The result holds ``fisher/<parameter>``, by the names in the model's files and in the parameter's shape, the mean
    over rows; and ``gram/<module>``, of shape (in, in), the sum over tokens.

    Args:
        work: The step's workspace. With several workers tasks of Ray Data share the rows, to the same bytes.
        model: What is measured; an adapter stands for the whole model that it makes of its base.
        base: What `model` was trained on, where it is an adapter.
        data: What it reads, one document or a piece of one in each row; of a classifier the first piece, and texts
            need no labels unless `labels` is ``data``.
        statistics: ``fisher``, the diagonal of the Fisher information, which goes row by row, and ``gram``, the
            second moment of what goes into matrices. Padding counts in neither, nor what comes after the last answer.
        labels: Whose labels the Fisher information is of: the model's own, ``sampled`` once or ``exact`` over all
            classes of a classifier, or those of the ``data``, which makes it the empirical one.
        modules: Which matrices have a Gram: each MLP's last one (``keys``), or ``all`` of every layer.
        layers: Only those of these layers, counted from 0; None takes all.
        max_rows: At most so many, the first ones; None takes all.
        length: Tokens of a row; a longer document becomes several rows.
        batch_size: Rows at once, where no kind goes row by row.
        seed: Decides which labels are drawn.

    Raises:
        HyperparameterError: A parameter is out of range.
        NoBlocks: The model has no layers with an MLP, or not those of `layers`.
        UnknownName: A label is none of the classifier's.
        NoLossToken: There is no token to tell in the data.
    """
    for problem in _out_of_range(statistics, layers, max_rows, length, batch_size, seed):
        raise problem
    folder = home_with("measure", model, base)
    rows = _rows(data, folder, length, labels, max_rows)
    home = work.scratch / "pass"
    home.mkdir()
    job = Pass(
        model=model,
        base=base,
        statistics=chosen(statistics, labels, modules, layers, seed),
        home=home,
        rows=len(rows),
        batch_size=batch_size,
    )
    tokens = lay_down(rows, home)
    total = observed(work, job)
    about: dict[str, Any] = {"model": model.digest, "kinds": list(statistics), "rows": len(rows), "tokens": tokens}
    about |= {"labels": labels} if FISHER in statistics else {}
    about |= {"modules": modules, **_judged(total, tokens)} if GRAM in statistics else {}
    made = work.scratch / STEM
    made.mkdir()
    save_file(_finished(total, job, folder), made / f"{STEM}.safetensors")
    (made / f"{STEM}.json").write_text(json.dumps(about, indent=2) + "\n")
    return work.save(Statistics, made, about)


def _forms(folder: Path | None, labels: Labels) -> tuple[Form, ...] | None:
    """What rows may be: a classifier needs no labels but where these are the data's."""
    if folder is None or architecture_of(folder) == "decoder":
        return None
    return (Form.LABELLED,) if labels == "data" else (Form.LABELLED, Form.TEXT)


def _rows(data: Dataset, folder: Path, length: int, labels: Labels, max_rows: int | None) -> Rows:
    forms = _forms(folder, labels)
    if forms is None:
        whole = packed_rows(data, load_tokenizer(folder), Training(length=length, packing=False))
    else:
        columns = read_rows(data, forms=forms).to_pydict()
        texts = columns["text"][:max_rows]
        given = columns["label"][:max_rows] if "label" in columns else []
        numbers = numbered(given, classifiers.labels_of(folder), data.uri) or [0] * len(texts)
        whole = classifiers.rows_of(texts, numbers, classifiers.load_tokenizer(folder), length)
    return Rows(whole.ids[:max_rows], whole.positions[:max_rows], whole.targets[:max_rows])


def _finished(total: Sums, job: Pass, folder: Path) -> Sums:
    """What is written: each parameter's under every name that the model's files have for it."""
    names = stored_names(outline(folder), Weights(folder)) if any(k.startswith(f"{FISHER}/") for k in total) else {}
    found: Sums = {}
    for statistic in job.statistics:
        for key in [k for k in total if k.startswith(f"{statistic.kind}/")]:
            value = statistic.finish(total.pop(key), job.rows)
            kind, _, name = key.partition("/")
            for stored in names[name] if kind == FISHER else [name]:
                found[f"{kind}/{stored}"] = value.clone()
    return found


def stored_names(model: nn.Module, weights: Weights) -> dict[str, list[str]]:
    """By the name of each parameter in a model those under which its files store it: several where it is tied.

    Raises:
        UnsupportedModel: They do not store it under a name that is known.
    """
    named = dict(model.named_parameters())
    first = {id(p): n for n, p in named.items()}
    every = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, list[str]] = {n: [] for n in named}
    for name, header in weights.headers.items():
        for alias in (name, f"{prefix}{name}", name.removeprefix(prefix)):  # a trunk's files leave its name out
            if alias in every and tuple(named[every[alias]].shape) == header.shape:
                found[every[alias]].append(name)
                break
    missing = next((n for n, names in found.items() if not names), None)
    if missing is not None:
        kind = str(getattr(model, "config", model).model_type)
        raise UnsupportedModel(kind, f"its files store nothing as {missing!r}", "Save it again with save_pretrained.")
    return found


def _judged(total: Mapping[str, Tensor], tokens: int) -> dict[str, Any]:
    """How far Gram matrices can be inverted: tokens for each column, and the ends of their spectra."""
    grams = {k.partition("/")[2]: v for k, v in total.items() if k.startswith(f"{GRAM}/")}
    widest = max(map(len, grams.values()))
    spectra = {name: torch.linalg.eigvalsh(gram.double()) for name, gram in grams.items() if len(gram) <= EIGEN_WIDTH}
    if tokens < TOKENS_PER_WIDTH * widest:
        print(f"{tokens} tokens for matrices of {widest} columns: too few to invert them; measure more rows")
    return {
        "tokens_per_width": tokens / widest,
        "eigenvalues": {name: [float(s[0]), float(s[-1])] for name, s in spectra.items()},
    }
