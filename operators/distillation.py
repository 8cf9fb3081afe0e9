"""The verb `distill`: a student learns what a teacher says of the next token."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfm.distillation.base import Distill, DistillFeatures
from lfm.errors import LfmError
from lfm.soft_targets import chunked_distillation
from lfm.tuning.full import Full
from operators.artifact import Dataset, Model
from operators.base import operator
from operators.data.batches import IGNORED, Batch, Rows
from operators.data.facts import carry
from operators.footprint import Footprint
from operators.learning.image_job import image_job
from operators.learning.loop import Job, Place
from operators.learning.memory import trained
from operators.learning.rehearsal import held
from operators.learning.trainer import fit
from operators.models import networks
from operators.models.ensemble_files import is_ensemble
from operators.models.ensembles import load_decoder
from operators.models.language_models import (
    DTYPES,
    check,
    config_of,
    head_of,
    heads_of,
    load_tokenizer,
    save,
    sketch,
    stored_dtype,
)
from operators.models.networks import is_network
from operators.models.objectives import answers
from operators.models.texts import packed_rows
from operators.resources import Resources
from operators.teaching.distillation_needs import other_tokens, problems
from operators.teaching.features import Features
from operators.teaching.labels import StoredLabels
from operators.teaching.student_text import StudentText, Written
from operators.teaching.teacher_text import answered
from operators.teaching.teachers import Quoted, Source, Teacher
from operators.training import Training
from operators.tuning import attached, learner, ready
from operators.workspace import Workspace


class DistillationError(LfmError, ValueError):
    """A teacher, a student and data that do not go together."""

    def __init__(self, clauses: tuple[str, ...]) -> None:
        super().__init__(clauses)
        self.clauses = clauses

    def __str__(self) -> str:
        return "\n".join(f"distill: {clause}" for clause in self.clauses)


def _footprint(
    *,
    teacher: Model | None,
    student: Model | None,
    method: Distill,
    hard_weight: float,
    training: Training,
    resources: Resources,
    kinds: Mapping[str, object],
    **_: object,
) -> Footprint | None:
    """What it takes; None of networks for images, of ensembles, and where a model is not known yet."""
    asked = "teacher" in kinds and method.needs.access != "text"
    if student is None or (asked and teacher is None) or is_network(student.path):
        return None
    if teacher is not None and is_ensemble(teacher.path):
        return None
    folders = [student.path, *([teacher.path] if asked and teacher is not None else [])]

    def make(layers: int | None, teachers: int | None = None) -> Sequence[nn.Module]:
        base = sketch(student.path, torch.float32, layers=layers)
        model = ready(attached(base, Full()), base, training)
        listened: Source = Quoted(head_of(model).size)  # as far as memory goes so are labels that are stored
        speaker = sketch(folders[1], DTYPES[training.precision], layers=teachers) if folders[1:] else None
        if speaker is not None:
            listened = Teacher(speaker, temperature=method.temperature, packed=training.packing)
        features = (
            Features(method, model, speaker) if isinstance(method, DistillFeatures) and speaker is not None else None
        )
        loss = FromTeacher(model, listened, method, hard_weight=hard_weight, packed=training.packing, features=features)
        return [loss] if speaker is None else [loss, speaker]

    def weighed() -> int:
        with torch.device("meta"):
            return held(sketch(folders[1], DTYPES[training.precision])) if folders[1:] else 0

    return trained(
        make,
        [config_of(folder) for folder in folders],
        training,
        resources,
        what=f"{method} {hard_weight}",
        teacher=weighed(),
        deep=isinstance(method, DistillFeatures),
    )


@operator(problems=problems, takes_ensembles=("teacher",), footprint=_footprint, like="student")
def distill(
    work: Workspace,
    *,
    teacher: Model | None = None,
    student: Model,
    data: Dataset,
    held_out: Dataset | None = None,
    method: Distill,
    top_k: int | None = None,
    hard_weight: float = 0.0,
    max_answer: int = 128,
    training: Training,
) -> Model:
    """Train a student on what a teacher says, of each loss token of `data`, of its own answers or of the student's.

    Both are language models, or both networks for images: then `data` are images, and their labels are what
    `hard_weight` weighs.

    Args:
        work: The step's workspace.
        teacher: Who is listened to; it stays as it is. None where `label` has written down the probabilities of `data`
            and `held_out`; a teacher that is given is asked whether there are labels or not.
        student: Who learns, all of its weights; it has the teacher's vocabulary, unless the method asks for text only.
        data: What both read.
        held_out: What the student is looked at with while it trains, with the same loss.
        method: How far the student is from the teacher, and who writes what is learnt.
        top_k: Keep the teacher's so many likeliest tokens of each place, and what all others have together, from the
            first time on that a row is met: further epochs need no teacher. None asks the teacher every time and
            compares the whole vocabulary. Of labels, so many are used of those that there are.
        hard_weight: The share of the data's own tokens in the loss, as cross entropy, the rest is the method's; in
            [0, 1]. Hinton's weighted average. Text that the student wrote has no such share.
        max_answer: Tokens of an answer at most, where the method lets the student write, or the teacher: its answers
            that have not ended then are left out.
        training: How it is trained; the teacher computes in `precision`.

    Raises:
        DistillationError: The vocabularies differ, somebody shall write without prompts, labels do not fit, or a number
            is out of range.
        DatasetError: The teacher shall answer a prompt that leaves no room, or ended none of its answers.
        LabelsError: A document is not the one that was labelled.
    """
    arguments = {
        "teacher": teacher,
        "student": student,
        "data": data,
        "held_out": held_out,
        "method": method,
        "top_k": top_k,
        "hard_weight": hard_weight,
        "max_answer": max_answer,
        "training": training,
    }
    wrong = tuple(problems(**arguments, resources=work.resources))  # type: ignore[arg-type]
    if wrong:
        raise DistillationError(wrong)
    wrote: dict[str, int] = {}
    if method.answers == "teacher":
        assert teacher is not None
        sets = {name: found for name, found in (("data", data), ("held_out", held_out)) if found is not None}
        work, answered_sets, wrote = answered(
            work, teacher.path, sets, max_answer=max_answer, precision=training.precision
        )
        arguments |= answered_sets
    folder, measures = fit(work, _job, {**arguments, "scratch": work.scratch}, training)
    carry([student.path] if teacher is None else [teacher.path, student.path], folder)
    return work.save(Model, folder, {"method": type(method).__name__, **wrote, **measures})


def _job(
    place: Place,
    *,
    teacher: Model | None,
    student: Model,
    data: Dataset,
    held_out: Dataset | None,
    method: Distill,
    top_k: int | None,
    hard_weight: float,
    max_answer: int,
    training: Training,
    scratch: Path,
) -> Job:
    if is_network(student.path):
        assert teacher is not None
        return _job_of_images(place, teacher, student, data, held_out, method, hard_weight, training)
    tokenizer = load_tokenizer(student.path)
    torch.manual_seed(training.seed)
    model = learner(student.path, Full(), training, place)
    labels = StoredLabels(top_k=top_k, folder=scratch)

    def read(found: Dataset) -> Rows:
        return labels.rows(found, tokenizer, training) if teacher is None else packed_rows(found, tokenizer, training)

    rows, looked_at = read(data), None if held_out is None else read(held_out)
    listened: Source = labels
    features: Features | None = None
    if method.needs.access == "text":
        listened = Quoted(head_of(model).size)
    elif teacher is not None:
        if load_tokenizer(teacher.path).get_vocab() != tokenizer.get_vocab():
            raise DistillationError((other_tokens(teacher.path, student.path),))
        speaker = load_decoder(teacher.path, DTYPES[training.precision])
        check(speaker, packed=training.packing)
        listened = asked = Teacher(speaker.to(place.device), temperature=method.temperature, packed=training.packing)
        if isinstance(method, DistillFeatures):
            torch.manual_seed(training.seed)  # what the projections start from
            features = Features(method, model, speaker)
        if top_k is not None:
            vocabulary = min(heads_of(m).size for m in (speaker, model))
            for known in (rows, looked_at):
                if known is not None:
                    asked.remember(known, top_k, vocabulary, scratch)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        named = {n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")}
        save(model, named, folder, tokenizer=student.path, dtype=stored_dtype(student.path))

    writes = StudentText(model, tokenizer, rows, method.student_share, max_answer, training, place)
    objective = FromTeacher(
        model, listened, method, hard_weight=hard_weight, packed=training.packing, features=features
    )
    return Job(
        objective=objective,
        rows=rows,
        held_out=looked_at,
        export=export,
        rewrite=writes if method.student_share > 0 else None,
    )


def _job_of_images(
    place: Place,
    teacher: Model,
    student: Model,
    data: Dataset,
    held_out: Dataset | None,
    method: Distill,
    hard_weight: float,
    training: Training,
) -> Job:
    model = networks.load(student.path)
    labels = networks.labels_of(student.path)
    job = image_job(model, labels, data, held_out)
    listened = Teacher(networks.load(teacher.path).to(place.device), temperature=method.temperature, packed=False)
    return replace(job, objective=FromTeacher(model, listened, method, hard_weight=hard_weight, packed=False))


class FromTeacher(nn.Module):
    """How far a student is from its teacher, mixed with the cross entropy of the data's own tokens.

    The teacher is no submodule: it gets no optimizer state, and no strategy takes it apart.
    """

    def __init__(
        self,
        model: Any,
        teacher: Source,
        method: Distill,
        *,
        hard_weight: float,
        packed: bool,
        features: Features | None = None,
    ) -> None:
        super().__init__()
        self.model, self.features = model, features
        self.teacher, self.method, self.hard_weight, self.packed = teacher, method, hard_weight, packed
        self.head = [head_of(model)]  # in a list: a submodule of the model must not be one of this module too

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's loss tokens."""
        hard_weight = 0.0 if isinstance(batch.rows, Written) else self.hard_weight
        if self.features is None:
            return self._of_logits(batch, hard_weight)
        with self.features.watched() as streams:
            of_logits = self._of_logits(batch, hard_weight)
        return of_logits + (1 - hard_weight) * self.features.loss(streams, batch.targets != IGNORED)

    def _of_logits(self, batch: Batch, hard_weight: float) -> Tensor:
        hidden, targets = answers(self.model, batch, packed=self.packed)
        head = self.head[0]
        return chunked_distillation(
            hidden,
            head.linear.weight,
            self.teacher.says(batch),
            self.method,
            targets=targets,
            hard_weight=hard_weight,
            bias=head.linear.bias,
            shaped=None if head.plain else head.shaped,
        )
