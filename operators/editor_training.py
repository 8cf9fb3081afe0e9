"""The verb `train_editor`: a network learns to edit one model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfm.editing.base import Fact, Lesson, TrainedEdit
from lfm.hooks import Blocks
from operators.artifact import Dataset, Editor, Model
from operators.base import operator
from operators.catalog import method_name
from operators.data.batches import IGNORED, Batch, Document, Rows, global_batch, on_device, order, packed
from operators.data.facts import read_facts, spoken, tokenized
from operators.data.row_files import DatasetError
from operators.editing import unfit_decoder, unfit_facts
from operators.learning.loop import Job, Place, Where
from operators.learning.trainer import fit, refused
from operators.models.editors import write
from operators.models.language_models import load, load_tokenizer
from operators.models.texts import packed_rows, unfit
from operators.resources import Resources
from operators.training import Training
from operators.workspace import Workspace


def problems(
    *,
    model: Model | None,
    data: Dataset | None,
    locality: Dataset | None,
    held_out: Dataset | None,
    method: TrainedEdit,
    training: Training,
    resources: Resources,
    **_: object,
) -> Iterator[str]:
    """What headers tell is wrong, a clause each; what is None cannot be looked at yet."""
    yield from refused(training, resources, method)
    if model is not None:
        yield from unfit_decoder(model.path, method)
    yield from unfit(training, None if model is None else model.path, {"locality": locality})
    for name, dataset in (("data", data), ("held_out", held_out)):
        if dataset is not None:
            yield from unfit_facts(name, dataset)
    if not isinstance(method, TrainedEdit):
        what = f"method: {type(method).__name__} edits without a trained network, expected one that trains an editor"
        yield f"{what}. Use it in a step of the verb 'edit'."
    if training.max_steps == 0:
        yield "max_steps=0, expected at least 1: an editor knows nothing but what it was trained on. Raise it."
    if training.gradient_checkpointing:
        fix = "Lower micro_batch_size instead, down to 1."
        yield f"gradient_checkpointing=True, expected false: the model that is edited is in evaluation mode. {fix}"


@operator(problems=problems)
def train_editor(
    work: Workspace,
    *,
    model: Model,
    data: Dataset,
    locality: Dataset,
    held_out: Dataset | None = None,
    method: TrainedEdit,
    training: Training,
) -> Editor:
    """Train a network that edits a model; the model itself stays as it is.

    A row of the training is a fact with one of its paraphrases, or with its own prompt where it has none; beside it
    lies the next text of `locality`. Each text has a row of its own.

    Args:
        work: The step's workspace.
        model: What is edited, in float32.
        data: Facts, to each of which the model is edited alone.
        locality: Texts about something else, on which an edit shall change nothing: of pairs and conversations the
            answers count.
        held_out: Facts that the editor is looked at with while it trains.
        method: How it edits.
        training: How it is trained; `precision` is that of the edited model.

    Raises:
        DatasetError: A fact is longer than a row.
        HyperparameterError: The model does not have what a field of the method asks for.
    """
    arguments = {
        "model": model,
        "data": data,
        "locality": locality,
        "held_out": held_out,
        "method": method,
        "training": training,
    }
    folder, measures = fit(work, _job, arguments, training)
    return work.save(Editor, folder, {"model": model.digest, "method": method_name(type(method)), **measures})


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons(Rows):
    """Rows whose targets are answers, after prompts that ask for facts.

    Attributes:
        facts: What an editor is told.
        told: The number of each row's fact.
        others: Texts about something else.
        beside: The number of the text that goes with each row.
    """

    facts: Sequence[Fact]
    told: Where
    others: Rows
    beside: Where

    def lesson(self, batch: Batch, at: int) -> Lesson | None:
        """One row of a batch of these; None of one without an answer, which a worker without work has."""
        learnt = batch.targets[at] != IGNORED
        if not learnt.any():
            return None
        row = batch.where[at]
        others = on_device(self.others, self.beside[[row]], batch.ids.device)
        asked = batch.ids[at, : int(learnt.nonzero()[0]) + 1]
        answer = batch.targets[at][learnt]
        return Lesson(self.facts[self.told[row]], asked, answer, others.ids, others.targets != IGNORED)


def lessons(data: Dataset, others: Rows, tokenizer: Any, training: Training) -> Lessons:
    """Facts as rows, each with a text beside it.

    Raises:
        DatasetError: One is longer than a row.
    """
    facts: list[Fact] = []
    told: list[int] = []
    found: list[Document] = []
    for row in read_facts(data):
        _fitting(row.prompt, row.target, data, tokenizer, training)
        for prompt in row.paraphrases or (row.prompt,):
            asked, said = _fitting(prompt, row.target, data, tokenizer, training)
            found.append(Document([*asked, *said], [False] * len(asked) + [True] * len(said)))
            told.append(len(facts))
        facts.append(tokenized(row, tokenizer))
    rows = packed(iter(found), length=training.length, padding=tokenizer.pad_token_id, packing=False, where=data.uri)
    beside = np.arange(len(rows)) % len(others)
    return Lessons(
        rows.ids, rows.positions, rows.targets, facts=facts, told=np.array(told), others=others, beside=beside
    )


def _fitting(
    prompt: str, answer: str, data: Dataset, tokenizer: Any, training: Training
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of its answer, which one row has room for."""
    asked, said = spoken(prompt, answer, tokenizer)
    if len(asked) + len(said) > training.length:
        what = f"{prompt!r} with its answer has {len(asked) + len(said)} tokens, expected at most"
        raise DatasetError(data.uri, f"{what} length={training.length}", "Raise it, or leave the row out.")
    return asked, said


class NextTexts:
    """Lays the next texts, of one epoch of them after another, beside the rows of each batch."""

    def __init__(self, rows: Lessons, training: Training) -> None:
        self.rows, self.training = rows, training

    def __call__(self, step: int, where: Where) -> tuple[Rows, Where]:
        """The rows of a step; the same on every rank."""
        beside = self.rows.beside.copy()
        beside[where] = global_batch(len(self.rows.others), step, len(where), self.training.seed + 1)
        return replace(self.rows, beside=beside), where


class EditedModel(nn.Module):
    """How far a model is, after each edit, from what it should be.

    The model is no submodule: it gets no optimizer state, and stays in evaluation mode.
    """

    def __init__(self, editor: nn.Module, model: nn.Module, blocks: Blocks, method: TrainedEdit) -> None:
        super().__init__()
        self.editor = editor
        self.method, self.edited = method, (model, blocks)

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's loss tokens: each fact's loss as often as its answer has tokens."""
        assert isinstance(batch.rows, Lessons)
        # Every parameter takes part, also of a worker without work: ddp waits for it.
        total = torch.stack([p.sum() * 0.0 for p in self.editor.parameters()]).sum()
        for at in range(len(batch.where)):
            lesson = batch.rows.lesson(batch, at)
            if lesson is not None:
                total = total + len(lesson.answer) * self.method.loss(self.editor, *self.edited, lesson)
        return total


def _job(
    place: Place,
    *,
    model: Model,
    data: Dataset,
    locality: Dataset,
    held_out: Dataset | None,
    method: TrainedEdit,
    training: Training,
) -> Job:
    tokenizer = load_tokenizer(model.path)
    edited = load(model.path, torch.float32).to(place.device).requires_grad_(False)
    edited.config.use_cache = False
    blocks = Blocks(edited)
    torch.manual_seed(training.seed)
    editor = method.build(edited, blocks).to(place.device)
    others = packed_rows(locality, tokenizer, replace(training, packing=False))
    rows = lessons(data, others, tokenizer, training)
    _observe(place, method, editor, edited, blocks, rows, training)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        named = {n.removeprefix("editor."): w for n, w in weights.items()}
        editor.load_state_dict({**editor.state_dict(), **named})
        write(editor, folder, model=model, method=method, changes=method.changes(blocks))

    return Job(
        objective=EditedModel(editor, edited, blocks, method),
        rows=rows,
        held_out=None if held_out is None else lessons(held_out, others, tokenizer, training),
        export=export,
        rewrite=NextTexts(rows, training),
    )


def _observe(
    place: Place,
    method: TrainedEdit,
    editor: nn.Module,
    model: nn.Module,
    blocks: Blocks,
    rows: Lessons,
    training: Training,
) -> None:
    """Have the editor look at the facts that it will be trained on, each worker at its share."""
    taken = order(len(rows), 0, training.seed)[: training.steps(len(rows)) * training.batch_size]
    mine = np.array_split(np.unique(rows.told[taken]), place.world)[place.rank]
    method.observe(editor, model, blocks, [rows.facts[i] for i in mine])
    if place.world > 1:
        for buffer in editor.buffers():
            torch.distributed.all_reduce(buffer)
