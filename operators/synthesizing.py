"""The verb `synthesize`: images made out of a teacher, or a student that learnt from such images, without data."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lfm.errors import HyperparameterError
from lfm.inversion import evaluating
from lfm.oracle import Oracle
from lfm.synthesis.base import Batch, State, Synthesize
from operators.artifact import Dataset, Model, kind_of
from operators.base import operator
from operators.data.images import Images, write_images
from operators.models.language_models import CALLED, architecture_of
from operators.models.networks import is_network, labels_of, load, network_of, save, unlike
from operators.needs import unmet
from operators.sharing.notices import Preempted
from operators.sharing.pace import Pace
from operators.workspace import Workspace

STATE, TENSORS = "manifest.json", "tensors.safetensors"


def problems(
    *,
    teacher: Model | None,
    student: Model | None,
    method: Synthesize,
    seed: int = 0,
    kinds: Mapping[str, object] | None = None,
    **_: object,
) -> Iterator[str]:
    """What headers tell is wrong, a clause each; what is None cannot be looked at yet."""
    yield from map(str, _out_of_range(seed))
    given = student is not None or "student" in (kinds or {})
    name = type(method).__name__
    if method.meets_student and not given:
        yield f"{name}: no student, expected a network for images. Name one under student."
    if given and not method.meets_student:
        yield f"{name}: a student is given, expected none, as it meets none. Leave it out."
    found = {"teacher": teacher, "student": student}
    models = {called: model.path for called, model in found.items() if model is not None}
    for called, path in models.items():
        if not is_network(path):
            what = CALLED[architecture_of(path)]
            yield f"{called}: {str(path)!r} is {what}, expected a network for images. Give another."
    networks = {called: path for called, path in models.items() if is_network(path)}
    if "teacher" in networks:
        is_like = "batchnorm" if network_of(networks["teacher"]).batchnorm else "network"
        yield from unmet(method, architectures=[is_like], called="teacher")
    if len(networks) == 2:
        yield from unlike(networks["teacher"], networks["student"])


def _out_of_range(seed: int) -> Iterator[HyperparameterError]:
    if seed < 0:
        yield HyperparameterError("synthesize", "seed", seed, "seed >= 0")


@operator(problems=problems)
def synthesize(
    work: Workspace,
    *,
    teacher: Model,
    student: Model | None = None,
    method: Synthesize,
    seed: int = 0,
) -> Dataset | Model:
    """Make images out of a teacher without any data, for a student to learn from, or teach it with them at once.

    A method says which: a data set of images, each with the label that it was made for, or the student. A teacher that
    need only give probabilities is only ever asked, and no more often than the method's budget.

    Args:
        work: The step's workspace.
        teacher: A network for images; it stays as it is.
        student: Who learns, or whose mistakes are looked for, where the method meets one: a network that tells the
            same labels of images of the same shape.
        method: How images are made.
        seed: Decides all that is drawn.

    Raises:
        HyperparameterError: A number is out of range.
        Preempted: The machine is about to be taken away; what was made is kept.
    """
    for problem in _out_of_range(seed):
        raise problem
    device = torch.device("cuda" if work.resources.gpus else "cpu")
    known, labels = load(teacher.path).to(device), labels_of(teacher.path)
    learner = None if student is None else load(student.path).to(device)
    source: nn.Module | Oracle = known
    if method.needs.access == "probabilities":
        source = Oracle(lambda images: known(images).softmax(dim=-1), budget=method.budget)
    made = Made(0, method.start(known.shape, len(labels), seed=seed))
    about: dict[str, object] = {"method": type(method).__name__, "rounds": method.rounds}
    about |= {"agreement": _run(work, method, made, source, known, learner)}
    if isinstance(source, Oracle):
        about["queries"] = source.spent
    folder = work.scratch / "made"
    if method.gives == kind_of(Model):
        assert learner is not None
        save(learner, {}, labels, folder)
        return work.save(Model, folder, about)
    pixels, shown = torch.cat(made.images), torch.cat(made.labels)
    write_images(Images(pixels.numpy(), tuple(labels[i] for i in shown)), folder)
    return work.save(Dataset, folder, about)


@dataclass(slots=True)
class Made:
    """What there is after some rounds.

    Attributes:
        done: How many these were.
        state: What the method remembers.
        images: Of all batches, on the CPU, where they are the result.
        labels: Of these.
    """

    done: int
    state: State
    images: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)


def _run(
    work: Workspace,
    method: Synthesize,
    made: Made,
    source: nn.Module | Oracle,
    teacher: nn.Module,
    student: nn.Module | None,
) -> float:
    """All rounds that are left, from where an earlier attempt was.

    Args:
        work: Where that is kept.
        method: How images are made.
        made: Changed in place.
        source: The teacher, or who asks it.
        teacher: The teacher itself.
        student: Who learns, or whose mistakes are looked for.

    Returns:
        In which share of the last batch its labels are seen, by the teacher, or by the student where that learns: what
        asks nothing more of an oracle.
    """
    learns = student is not None and method.gives == kind_of(Model)
    judge, learner = (student, student) if student is not None and learns else (teacher, None)
    kept, pace, agreement = work.kept(), Pace(), 0.0
    if kept is not None:
        agreement = _resume(kept, made, source, learner)
    device = next(judge.parameters()).device
    made.state = {name: tensor.to(device) for name, tensor in made.state.items()}
    while made.done < method.rounds:
        made.state, batch = method.round(made.state, source, student)
        made.done += 1
        if not learns:
            made.images.append(batch.images.cpu())
            made.labels.append(batch.labels.cpu())
        agreement = _agreement(judge, batch)
        queries = {"queries": source.spent} if isinstance(source, Oracle) else {}
        work.progress(made.done, method.rounds, agreement=agreement, **queries)
        leaving = work.leaving()
        if made.done < method.rounds and (leaving or pace.due(made.done)):
            with pace.kept():
                _keep(work, made, source, learner, agreement)
            if leaving:
                raise Preempted(made.done, method.rounds)
    return agreement


@torch.no_grad()
def _agreement(judge: nn.Module, batch: Batch) -> float:
    with evaluating(judge):
        return float((judge(batch.images).argmax(dim=-1) == batch.labels).double().mean())


def _keep(work: Workspace, made: Made, source: nn.Module | Oracle, student: nn.Module | None, agreement: float) -> None:
    """Write all that the rounds to come need, and what is part of the result."""
    folder = work.scratch / f"round-{made.done}"
    folder.mkdir()
    tensors = {f"state.{name}": tensor for name, tensor in made.state.items()}
    if student is not None:
        tensors |= {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    if made.images:
        tensors |= {"images": torch.cat(made.images), "labels": torch.cat(made.labels)}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    spent = source.spent if isinstance(source, Oracle) else 0
    (folder / STATE).write_text(json.dumps({"done": made.done, "spent": spent, "agreement": agreement}))
    work.keep(folder)


def _resume(kept: Path, made: Made, source: nn.Module | Oracle, student: nn.Module | None) -> float:
    """Take over what `_keep` wrote; returns the last agreement."""
    said, tensors = json.loads((kept / STATE).read_text()), load_file(kept / TENSORS)
    made.done, made.state = said["done"], _below("state.", tensors)
    if isinstance(source, Oracle):
        source.spent = said["spent"]
    if student is not None:
        student.load_state_dict(_below("student.", tensors))
    if "images" in tensors:
        made.images, made.labels = [tensors["images"]], [tensors["labels"]]
    return float(said["agreement"])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
