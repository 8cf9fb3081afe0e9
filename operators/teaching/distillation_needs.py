"""Whether a teacher, a student, data and a method go together: what headers tell before anything runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lfm.distillation.base import Distill, DistillFeatures
from lfm.errors import LfmError
from operators.artifact import Dataset, Model
from operators.data.rows import SPOKEN, Form, columns_of, form_of
from operators.data.vocabulary import digest, tokens
from operators.learning.trainer import refused
from operators.models.ensembles import asks_several
from operators.models.language_models import CALLED, architecture_of, head_size, num_layers
from operators.models.networks import is_network, network_of, tells_otherwise, unsplittable
from operators.models.texts import unfit
from operators.needs import unmet
from operators.resources import Resources
from operators.teaching.labels import labelling_of
from operators.training import Training


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
    if any(model is not None and is_network(model.path) for model in (teacher, student)):
        yield from unmet(method, architectures=["network"], called="student")
        yield from unfit(training, None, sets, (Form.IMAGE,))
        yield from _unlike(teacher, student, method, top_k, training, resources)
        if teacher is None and "teacher" not in (kinds or {}):
            yield "teacher: none is given, expected a network for images. Give one: there are no labels of images."
        return
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


def _unlike(
    teacher: Model | None,
    student: Model | None,
    method: Distill,
    top_k: int | None,
    training: Training,
    resources: Resources,
) -> Iterator[str]:
    """Whether two networks for images see the same and tell the same, and nothing is asked that only text has."""
    if method.student_share > 0:
        yield f"student_share={method.student_share!r} with networks for images, expected 0, as these write nothing."
    if top_k is not None:
        yield f"top_k={top_k!r} with networks for images, expected none: each tells all of its labels. Leave it out."
    for name, model in (("teacher", teacher), ("student", student)):
        if model is not None and not is_network(model.path):
            what = CALLED[architecture_of(model.path)]
            yield f"{name}: {str(model.path)!r} is {what}, expected a network for images, as the other. Give another."
    if student is not None and is_network(student.path):
        yield from unsplittable(network_of(student.path), training, resources)
        if teacher is not None and is_network(teacher.path):
            yield from tells_otherwise(teacher.path, student.path)


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
    name = type(method).__name__
    if teacher is not None and asks_several(teacher.path):
        fix = "Choose another method."
        yield f"teacher: {teacher.uri!r} answers with several models, expected one with layers for {name}. {fix}"
    if top_k is not None:
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
        yield other_tokens(teacher, student)
    elif sizes and max(spoken, default=0) >= min(sizes):
        head = f"a head of {min(sizes)} entries for a tokenizer of {max(spoken) + 1} tokens"
        yield f"{head}, expected one for each. Take the tokenizer that the model was trained with."


def other_tokens(teacher: Path, student: Path) -> str:
    """A clause about two models that do not share their tokens."""
    return (
        f"the tokenizer of the teacher {teacher.name!r} is not that of the student {student.name!r}, expected the same "
        "tokens with the same numbers. Take two of one family, or pretrain the student with the teacher as tokenizer."
    )
