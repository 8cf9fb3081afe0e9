"""The verb `recalibrate`: what batch normalisation has seen is measured anew, as after every average of weights."""

from collections.abc import Callable, Iterator

import torch

from lfm.errors import HyperparameterError, LfmError
from lfm.networks import ImageNetwork
from lfm.recalibration import recalibrate as measured_anew
from operators.artifact import Dataset, Model
from operators.base import operator
from operators.data.facts import carry
from operators.data.images import Images, read_images
from operators.data.rows import Form
from operators.models import networks
from operators.models.language_models import CALLED, architecture_of
from operators.models.texts import unfit
from operators.training import Training
from operators.workspace import Workspace


class NoNormalisation(LfmError, ValueError):
    """A model that has no batch normalisation."""

    def __init__(self, model: str, what: str) -> None:
        super().__init__(model, what)
        self.model, self.what = model, what

    def __str__(self) -> str:
        return f"recalibrate: {self.model!r} is {self.what}, expected a network with batch normalisation. Leave it out."


def _foreseen(*, model: Model | None, data: Dataset | None, batch_size: int = 256, **_: object) -> Iterator[str]:
    yield from map(str, _out_of_range(batch_size))
    try:
        if model is not None:
            check(model)
    except LfmError as problem:
        yield str(problem)
    yield from unfit(Training(), None, {"data": data}, (Form.IMAGE,))


def _out_of_range(batch_size: int) -> Iterator[HyperparameterError]:
    if batch_size < 1:
        yield HyperparameterError("recalibrate", "batch_size", batch_size, "batch_size >= 1")


def check(model: Model) -> None:
    """Refuse a model without batch normalisation; reads its description only.

    Raises:
        NoNormalisation: It has none.
    """
    if (what := architecture_of(model.path)) != "network":
        raise NoNormalisation(model.uri, CALLED[what])
    if not networks.network_of(model.path).batchnorm:
        raise NoNormalisation(model.uri, "a network without any")


@operator(problems=_foreseen)
def recalibrate(work: Workspace, *, model: Model, data: Dataset, batch_size: int = 256) -> Model:
    """Give a network's batch normalisation the mean and variance of what each layer gets from a data set.

    Weights that were averaged make something else of images than either model did, so that what both have seen fits
    no more. Layer after layer is measured over all images; parameters stay as they are.

    Args:
        work: The step's workspace.
        model: The network.
        data: Images; labels are not read.
        batch_size: Images at once; it changes nothing but rounding.

    Raises:
        NoNormalisation: The model has none.
        DatasetError: The images are of another size.
    """
    for problem in _out_of_range(batch_size):
        raise problem
    check(model)
    network = networks.load(model.path)
    network.to(work.resources.device)
    images = networks.fitting(read_images(data), network.shape, data.uri)
    number = measured_anew(network, asking(network, images, batch_size))
    work.progress(1, 1)
    folder = work.scratch / "recalibrated"
    networks.save(network, {}, networks.labels_of(model.path), folder)
    carry([model.path], folder)
    return work.save(Model, folder, {"images": len(images), "layers": number})


def asking(network: ImageNetwork, images: Images, batch_size: int) -> Callable[[], None]:
    """What asks a network about all images, batch by batch."""
    device = network.mean.device

    def ask() -> None:
        for start in range(0, len(images), batch_size):
            network(torch.from_numpy(images.pixels[start : start + batch_size]).to(device))

    return ask
