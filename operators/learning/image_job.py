"""A network and images with labels -> what the loop trains."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lfm.networks import ImageNetwork
from operators.artifact import Dataset
from operators.data.classes import numbered
from operators.data.images import ImageRows, image_rows, read_images
from operators.learning.loop import Job
from operators.models.networks import LabelLoss, fitting, save


def labelled_images(dataset: Dataset, labels: Sequence[str], shape: tuple[int, int, int]) -> ImageRows:
    """Images as a network of such labels takes them.

    Raises:
        DatasetError: They are of another size.
        UnknownName: A label is none of these.
    """
    images = fitting(read_images(dataset), shape, dataset.uri)
    return image_rows(images, numbered(images.labels, labels, dataset.uri))


def image_job(
    model: ImageNetwork,
    labels: Sequence[str],
    data: Dataset,
    held_out: Dataset | None,
    *,
    needs_frozen: bool = False,
) -> Job:
    """What tells the labels of images apart; all of the network that requires a gradient learns."""

    def export(weights: Mapping[str, Tensor], folder: Path) -> None:
        save(model, {n.removeprefix("model."): w for n, w in weights.items()}, labels, folder)

    return Job(
        objective=LabelLoss(model),
        rows=labelled_images(data, labels, model.shape),
        held_out=None if held_out is None else labelled_images(held_out, labels, model.shape),
        export=export,
        needs_frozen=needs_frozen,
    )
