"""The verb `distill`: a student learns what a teacher says of the next token."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfm.distillation.base import Distill
from lfm.errors import LfmError
from lfm.soft_targets import chunked_distillation
from lfm.tuning.full import Full
from operators.artifact import Dataset, Model
from operators.base import operator
from operators.batches import Batch
from operators.facts import carry
from operators.language_models import DTYPES, check, config_of, head_of, load, load_tokenizer, save, stored_dtype
from operators.loop import Job, Place
from operators.objectives import answers
from operators.resources import Resources
from operators.rows import SPOKEN, Form, columns_of, form_of
from operators.student_text import StudentText, Written
from operators.teachers import Teacher
from operators.texts import packed_rows, unfit
from operators.trainer import fit, refused
from operators.training import Training
from operators.tuning import learner
from operators.vocabulary import tokens
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
    **_: object,
) -> Iterator[str]:
    """What headers tell is wrong, a clause each; what is None cannot be looked at yet."""
    yield from refused(training, resources, method)
    yield from unfit(training, None if student is None else student.path, {"data": data, "held_out": held_out}, SPOKEN)
    if teacher is not None:
        yield from (f"teacher: {clause}" for clause in unfit(training, teacher.path, {}, SPOKEN))
    if not 0 <= hard_weight <= 1:
        yield f"hard_weight={hard_weight!r}, expected 0 <= hard_weight <= 1. It is the share of the hard labels."
    if max_answer < 1:
        yield f"max_answer={max_answer!r}, expected max_answer >= 1. It counts the tokens that the student writes."
    if hard_weight > 0 and method.student_share == 1:
        fix = "What the student wrote is no label; lower student_share."
        yield f"hard_weight={hard_weight!r} with student_share=1, expected 0. {fix}"
    sizes = [size for m in (teacher, student) if m is not None and (size := _head_size(m.path)) is not None]
    if top_k is not None and not 1 <= top_k <= min(sizes, default=top_k):
        most = f" <= {min(sizes)}, the vocabulary" if sizes else ""
        yield f"top_k={top_k!r}, expected 1 <= top_k{most}. Leave it out to use all that the teacher says."
    if teacher is not None and student is not None:
        yield from _mismatched(teacher.path, student.path, sizes)
    if data is not None and method.student_share > 0 and _is_text(data):
        share = f"student_share={method.student_share!r} on {data.uri!r}, which holds plain text"
        yield f"{share}, expected prompts to answer. Set student_share to 0, or give pairs or conversations."


@operator(problems=problems)
def distill(
    work: Workspace,
    *,
    teacher: Model,
    student: Model,
    data: Dataset,
    held_out: Dataset | None = None,
    method: Distill,
    top_k: int | None = None,
    hard_weight: float = 0.0,
    max_answer: int = 128,
    training: Training,
) -> Model:
    """Train a student on what a teacher says, of each loss token of `data` or of text that the student writes.

    Args:
        work: The step's workspace.
        teacher: Who is listened to; it stays as it is.
        student: Who learns, all of its weights; it has the teacher's vocabulary.
        data: What both read.
        held_out: What the student is looked at with while it trains, with the same loss.
        method: How far the student is from the teacher.
        top_k: Keep the teacher's so many likeliest tokens of each place, and what all others have together, from the
            first time on that a row is met: further epochs need no teacher. None asks the teacher every time and
            compares the whole vocabulary.
        hard_weight: The share of the data's own tokens in the loss, as cross entropy, the rest is the method's; in
            [0, 1]. Hinton's weighted average. Text that the student wrote has no such share.
        max_answer: Tokens that the student writes for a prompt at most, where the method lets it write.
        training: How it is trained; the teacher computes in `precision`.

    Raises:
        DistillationError: The vocabularies differ, the student shall write without prompts, or a number is out of
            range.
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
    folder, measures = fit(work, _job, {**arguments, "scratch": work.scratch}, training)
    carry([teacher.path, student.path], folder)
    return work.save(Model, folder, {"method": type(method).__name__, **measures})


def _job(
    place: Place,
    *,
    teacher: Model,
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
    if load_tokenizer(teacher.path).get_vocab() != tokenizer.get_vocab():
        raise DistillationError((_different(teacher.path, student.path),))
    torch.manual_seed(training.seed)
    model = learner(student.path, Full(), training, place)
    speaker = load(teacher.path, DTYPES[training.precision])
    check(speaker, packed=training.packing)
    rows = packed_rows(data, tokenizer, training)
    looked_at = None if held_out is None else packed_rows(held_out, tokenizer, training)
    listened = Teacher(speaker.to(place.device), temperature=method.temperature, packed=training.packing)
    if top_k is not None:
        vocabulary = min(head_of(m).linear.out_features for m in (speaker, model))
        for known in (rows, looked_at):
            if known is not None:
                listened.remember(known, top_k, vocabulary, scratch)

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        named = {n.removeprefix("model."): w for n, w in weights.items()}
        save(model, named, folder, tokenizer=student.path, dtype=stored_dtype(student.path))

    writes = StudentText(model, tokenizer, rows, method.student_share, max_answer, training, place)
    return Job(
        objective=FromTeacher(model, listened, method, hard_weight=hard_weight, packed=training.packing),
        rows=rows,
        held_out=looked_at,
        export=export,
        rewrite=writes if method.student_share > 0 else None,
    )


class FromTeacher(nn.Module):
    """How far a student is from its teacher, mixed with the cross entropy of the data's own tokens.

    The teacher is no submodule: it gets no optimizer state, and no strategy takes it apart.
    """

    def __init__(self, model: Any, teacher: Teacher, method: Distill, *, hard_weight: float, packed: bool) -> None:
        super().__init__()
        self.model = model
        self.teacher, self.method, self.hard_weight, self.packed = teacher, method, hard_weight, packed
        self.head = [head_of(model)]  # in a list: a submodule of the model must not be one of this module too

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's loss tokens."""
        hidden, targets = answers(self.model, batch, packed=self.packed)
        head = self.head[0]
        return chunked_distillation(
            hidden,
            head.linear.weight,
            self.teacher.says(batch),
            self.method,
            targets=targets,
            hard_weight=0.0 if isinstance(batch.rows, Written) else self.hard_weight,
            bias=head.linear.bias,
            shaped=None if head.plain else head.shaped,
        )


def _is_text(data: Dataset) -> bool:
    try:
        return form_of(columns_of(data.uri), data.uri) is Form.TEXT
    except LfmError:  # `unfit` says what is wrong with it
        return False


def _head_size(folder: Path) -> int | None:
    """How many entries a model says its head has, of which the last may be padding."""
    config = config_of(folder)
    size: int | None = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size


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
