"""The verb `synthesize`: images made out of a teacher, or a student that learnt from such images, without data."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lfm.errors import HyperparameterError, LfmError
from lfm.networks import ImageNetwork, evaluating
from lfm.oracle import Oracle
from lfm.synthesis.base import State, Synthesize
from operators.artifact import Dataset, Model, kind_of
from operators.base import operator
from operators.data.images import Images, write_images
from operators.models.language_models import CALLED, architecture_of
from operators.models.networks import is_network, labels_of, load, network_of, save, tells_otherwise
from operators.needs import unmet
from operators.sharing.notices import Preempted
from operators.sharing.pace import Pace
from operators.workspace import Workspace

STATE, TENSORS = "manifest.json", "tensors.safetensors"


class SynthesisDiverged(LfmError, ArithmeticError):
    """Images or weights that are no numbers any more."""

    def __init__(self, method: str, round: int, what: str) -> None:
        super().__init__(method, round, what)
        self.method, self.round, self.what = method, round, what

    def __str__(self) -> str:
        return (
            f"{self.method}: round {self.round} made {self.what} that are no numbers, expected finite ones. "
            "Lower the method's learning rates."
        )


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
        yield from tells_otherwise(networks["teacher"], networks["student"])


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
        SynthesisDiverged: What was made is no number any more.
        Preempted: The machine is about to be taken away; what was made is kept.
    """
    for problem in _out_of_range(seed):
        raise problem
    making = _started(work, teacher, student, method, seed)
    _run(work, making)
    about: dict[str, object] = {"method": type(method).__name__, "rounds": making.done, "agreement": making.agreement}
    if isinstance(making.source, Oracle):
        about["queries"] = making.source.spent
    labels, folder = labels_of(teacher.path), work.scratch / "made"
    if making.learner is not None:
        save(making.learner, {}, labels, folder)
        return work.save(Model, folder, about)
    pixels, shown = torch.cat(making.images), torch.cat(making.labels)
    write_images(Images(pixels.numpy(), tuple(labels[i] for i in shown)), folder)
    return work.save(Dataset, folder, about)


@dataclass(kw_only=True, slots=True)
class Making:
    """What takes part in the rounds, and what there is after some of them.

    Attributes:
        method: How images are made.
        teacher: Whose they are.
        source: The teacher as the method may use it.
        student: Whose mistakes are looked for, or who learns.
        learner: The student, where it is the result.
        state: What the method remembers.
        done: How many rounds there were.
        images: Of all batches, on the CPU, where they are the result.
        labels: Of these.
        agreement: In which share of the last batch its labels are seen: by the teacher, or by a student that learns,
            which asks no oracle once more.
    """

    method: Synthesize
    teacher: ImageNetwork
    source: nn.Module | Oracle
    student: ImageNetwork | None
    learner: ImageNetwork | None
    state: State
    done: int = 0
    images: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    agreement: float = 0.0

    def round(self) -> None:
        """One more."""
        self.state, batch = self.method.round(self.state, self.source, self.student)
        self.done += 1
        weights = [] if self.learner is None else [*self.learner.state_dict().values()]
        for what, found in (("images", [batch.images]), ("weights", weights)):
            if not all(bool(tensor.isfinite().all()) for tensor in found):
                raise SynthesisDiverged(type(self.method).__name__, self.done, what)
        if self.learner is None:
            self.images.append(batch.images.cpu())
            self.labels.append(batch.labels.cpu())
        judge = self.learner or self.teacher
        with evaluating(judge), torch.no_grad():
            self.agreement = float((judge(batch.images).argmax(dim=-1) == batch.labels).double().mean())

    def write(self, folder: Path) -> None:
        """All that the rounds to come need, and what is part of the result."""
        tensors = {f"state.{name}": tensor for name, tensor in self.state.items()}
        if self.learner is not None:
            tensors |= {f"student.{name}": tensor for name, tensor in self.learner.state_dict().items()}
        if self.images:
            tensors |= {"images": torch.cat(self.images), "labels": torch.cat(self.labels)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        spent = self.source.spent if isinstance(self.source, Oracle) else 0
        said = {"done": self.done, "spent": spent, "agreement": self.agreement}
        (folder / STATE).write_text(json.dumps(said))

    def read(self, folder: Path) -> None:
        """Take over what `write` wrote."""
        said, tensors = json.loads((folder / STATE).read_text()), load_file(folder / TENSORS)
        self.done, self.agreement = said["done"], said["agreement"]
        self.state = _below("state.", tensors)
        if isinstance(self.source, Oracle):
            self.source.spent = said["spent"]
        if self.learner is not None:
            self.learner.load_state_dict(_below("student.", tensors))
        if "images" in tensors:
            self.images, self.labels = [tensors["images"]], [tensors["labels"]]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _started(work: Workspace, teacher: Model, student: Model | None, method: Synthesize, seed: int) -> Making:
    """Before the first round, or after the last one of which an earlier attempt kept what there was."""
    device = torch.device(work.resources.device)
    known = load(teacher.path).to(device)
    pupil = None if student is None else load(student.path).to(device)
    source: nn.Module | Oracle = known
    if method.needs.access == "probabilities":
        source = Oracle(lambda images: known(images).softmax(dim=-1), budget=method.budget)
    making = Making(
        method=method,
        teacher=known,
        source=source,
        student=pupil,
        learner=pupil if method.gives == kind_of(Model) else None,
        state=method.start(known.shape, known.head.out_features, seed=seed),
    )
    if (kept := work.kept()) is not None:
        making.read(kept)
    making.state = {name: tensor.to(device) for name, tensor in making.state.items()}
    return making


def _run(work: Workspace, making: Making) -> None:
    """All rounds that are left."""
    pace, rounds = Pace(), making.method.rounds
    while making.done < rounds:
        making.round()
        asked = {"queries": making.source.spent} if isinstance(making.source, Oracle) else {}
        work.progress(making.done, rounds, agreement=making.agreement, **asked)
        leaving = work.leaving()
        if making.done < rounds and (leaving or pace.due(making.done)):
            with pace.kept():
                folder = work.scratch / f"round-{making.done}"
                folder.mkdir()
                making.write(folder)
                work.keep(folder)
            if leaving:
                raise Preempted(making.done, rounds)
