"""The verb `distill`: a student learns what a teacher says of the next token."""

from collections.abc import Iterator, Mapping, Sequence
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
from operators.batches import IGNORED, Batch, Rows
from operators.facts import carry
from operators.features import Features
from operators.labels import StoredLabels, labelling_of
from operators.language_models import (
    DTYPES,
    check,
    head_of,
    head_size,
    load,
    load_tokenizer,
    num_layers,
    save,
    stored_dtype,
)
from operators.loop import Job, Place
from operators.objectives import answers
from operators.resources import Resources
from operators.rows import SPOKEN, Form, columns_of, form_of
from operators.student_text import StudentText, Written
from operators.teacher_text import answered
from operators.teachers import Quoted, Source, Teacher
from operators.texts import packed_rows, unfit
from operators.trainer import fit, refused
from operators.training import Training
from operators.tuning import learner
from operators.vocabulary import digest, tokens
from operators.workspace import Workspace


class DistillationError(LfmError, ValueError):
    """A teacher, a student and data that do not go together."""

    def __init__(self, clauses: tuple[str, ...]) -> None:
        super().__init__(clauses)
        self.clauses = clauses

    def __str__(self) -> str:
        return "\n".join(f"distill: {clause}" for clause in self.clauses)


def problems(
    *,
    teacher: Model | None,
    student: Model | None,
    data: Dataset | None,
    held_out: Dataset | None,
    method: Distill,
    top_k: int | None,
    hard_weight: float,
    max_answer: int,
    training: Training,
    resources: Resources,
    kinds: Mapping[str, object] | None = None,
    **_: object,
) -> Iterator[str]:
    """What headers tell is wrong, a clause each; what is None cannot be looked at yet."""
    sets = {"data": data, "held_out": held_out}
    yield from refused(training, resources, method)
    yield from unfit(training, None if student is None else student.path, sets, SPOKEN)
    if teacher is not None and method.needs.access != "text":
        yield from (f"teacher: {clause}" for clause in unfit(training, teacher.path, {}, SPOKEN))
    if not 0 <= hard_weight <= 1:
        yield f"hard_weight={hard_weight!r}, expected 0 <= hard_weight <= 1. It is the share of the hard labels."
    if max_answer < 1:
        yield f"max_answer={max_answer!r}, expected max_answer >= 1. It counts the tokens of a written answer."
    if hard_weight > 0 and method.student_share == 1:
        fix = "What the student wrote is no label; lower student_share."
        yield f"hard_weight={hard_weight!r} with student_share=1, expected 0. {fix}"
    sizes = [size for m in (teacher, student) if m is not None and (size := head_size(m.path)) is not None]
    if top_k is not None and not 1 <= top_k <= min(sizes, default=top_k):
        most = f" <= {min(sizes)}, the vocabulary" if sizes else ""
        yield f"top_k={top_k!r}, expected 1 <= top_k{most}. Leave it out to use all that the teacher says."
    yield from _unwritten(method, data)
    if isinstance(method, DistillFeatures):
        yield from _untapped(method, teacher, student, top_k)
    if method.needs.access == "text":
        yield from _only_text(method, top_k, hard_weight)
    elif teacher is not None and student is not None:
        yield from _mismatched(teacher.path, student.path, sizes)
    if teacher is None and "teacher" not in (kinds or {}):
        yield from _without_teacher(student, sets, method, top_k, training)


def _unwritten(method: Distill, data: Dataset | None) -> Iterator[str]:
    """Whether there are prompts where somebody is to answer them."""
    if data is None or not _is_text(data):
        return
    if method.answers == "teacher":
        yield f"data: {data.uri!r} holds plain text, expected prompts for the teacher. Give pairs or conversations."
    elif method.student_share > 0:
        share = f"student_share={method.student_share!r} on {data.uri!r}, which holds plain text"
        yield f"{share}, expected prompts to answer. Set student_share to 0, or give pairs or conversations."


def _untapped(
    method: DistillFeatures, teacher: Model | None, student: Model | None, top_k: int | None
) -> Iterator[str]:
    """Whether layers are there that a method names."""
    if top_k is not None:
        name = type(method).__name__
        yield f"top_k={top_k!r} with {name}, expected none, as only likely tokens are remembered. Leave it out."
    depths = [None if m is None else num_layers(m.path) for m in (student, teacher)]
    if depths[0] is not None and depths[1] is not None:
        try:
            method.taps(depths[0], depths[1])
        except LfmError as problem:
            yield str(problem)


def _only_text(method: Distill, top_k: int | None, hard_weight: float) -> Iterator[str]:
    """What makes no sense where the teacher does nothing but write."""
    name = type(method).__name__
    if top_k is not None:
        yield f"top_k={top_k!r} with {name}, expected none, as only text is asked of the teacher. Leave it out."
    if hard_weight > 0:
        yield f"hard_weight={hard_weight!r} with {name}, expected 0, as its labels are the teacher's. Leave it out."


def _without_teacher(
    student: Model | None, sets: Mapping[str, Dataset | None], method: Distill, top_k: int | None, training: Training
) -> Iterator[str]:
    """Whether labels are there in the teacher's place, and are what the method asks for."""
    name = type(method).__name__
    if method.needs.access == "text":
        yield f"teacher: none is given, expected one for {name}. Give one, or tune on what label made it write."
        return
    if method.needs.access != "probabilities":
        yield f"teacher: none is given, expected one for {name}, which looks at more than labels say. Give it."
        return
    if method.student_share > 0:
        share = f"student_share={method.student_share!r} without a teacher"
        yield f"{share}, expected 0, as labels are of the data's text alone. Set it to 0 or give the teacher."
    for key, data in sets.items():
        if data is not None:
            yield from (f"{key}: {clause}" for clause in _unfit_labels(data, student, method, top_k, training))


def _unfit_labels(
    data: Dataset, student: Model | None, method: Distill, top_k: int | None, training: Training
) -> Iterator[str]:
    labelling = labelling_of(data)
    if labelling is None:
        yield f"{data.uri!r} holds no labels and no teacher is given, expected either. Have label make them."
        return
    if method.temperature != labelling.temperature:
        yield (
            f"{data.uri!r} was labelled at temperature={labelling.temperature!r}, expected the method's, "
            f"{method.temperature!r}. Change the one or the other."
        )
    if top_k is not None and top_k > labelling.top_k:
        yield f"top_k={top_k!r}, expected at most the {labelling.top_k} tokens that labels name. Lower it."
    whole = labelling.longest <= min(labelling.length, training.length)
    if not whole and labelling.length != training.length:
        yield (
            f"{data.uri!r} has a document of {labelling.longest} tokens and was labelled at length={labelling.length}, "
            f"expected length={labelling.length} or a document's room. Change length."
        )
    if student is None:
        return
    if labelling.tokens and digest(student.path) not in ("", labelling.tokens):
        fix = "Take a student of the teacher's family, or pretrain it with the teacher as tokenizer."
        yield f"{data.uri!r} was labelled with another tokenizer than the student's, expected the same. {fix}"
    elif (size := head_size(student.path)) is not None and size < labelling.vocabulary:
        head = f"a head of {size} entries for the {labelling.vocabulary} tokens of {data.uri!r}"
        yield f"{head}, expected one for each. Take another student."


@operator(problems=problems)
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
        listened = Quoted(head_of(model).linear.out_features)
    elif teacher is not None:
        if load_tokenizer(teacher.path).get_vocab() != tokenizer.get_vocab():
            raise DistillationError((_different(teacher.path, student.path),))
        speaker = load(teacher.path, DTYPES[training.precision])
        check(speaker, packed=training.packing)
        listened = asked = Teacher(speaker.to(place.device), temperature=method.temperature, packed=training.packing)
        if isinstance(method, DistillFeatures):
            torch.manual_seed(training.seed)  # what the projections start from
            features = Features(method, model, speaker)
        if top_k is not None:
            vocabulary = min(head_of(m).linear.out_features for m in (speaker, model))
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


def _is_text(data: Dataset) -> bool:
    try:
        return form_of(columns_of(data.uri), data.uri) is Form.TEXT
    except LfmError:  # `unfit` says what is wrong with it
        return False


def _mismatched(teacher: Path, student: Path, sizes: Sequence[int]) -> Iterator[str]:
    """Whether the tokens are the same ones; heads may differ in padding, as those of one family of models do."""
    spoken, understood = (tokens(folder) for folder in (teacher, student))
    if spoken is None or understood is None:
        return
    if spoken != understood:
        yield _different(teacher, student)
    elif sizes and max(spoken, default=0) >= min(sizes):
        head = f"a head of {min(sizes)} entries for a tokenizer of {max(spoken) + 1} tokens"
        yield f"{head}, expected one for each. Take the tokenizer that the model was trained with."


def _different(teacher: Path, student: Path) -> str:
    return (
        f"the tokenizer of the teacher {teacher.name!r} is not that of the student {student.name!r}, expected the same "
        "tokens with the same numbers. Take two of one family, or pretrain the student with the teacher as tokenizer."
    )
