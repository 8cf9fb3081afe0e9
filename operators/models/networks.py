"""Folders <-> small networks for images of this project; images as they take them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm.errors import LfmError
from lfm.networks import ImageNetwork, Network
from lfm.weights import Weights
from operators.artifact import REWRITES
from operators.data.batches import IGNORED, Batch
from operators.data.images import ImageRows, Images
from operators.data.row_files import DatasetError
from operators.models.description import described
from operators.resources import Resources
from operators.training import Training

KEY = "network"
STEM = "model"


class NetworkError(LfmError, ValueError):
    """A folder that describes no network of this version, or one that its tensors do not fit."""

    def __init__(self, folder: str, what: str, allowed: str) -> None:
        super().__init__(folder, what, allowed)
        self.folder, self.what, self.allowed = folder, what, allowed

    def __str__(self) -> str:
        return f"{self.folder!r} {self.what}, expected {self.allowed}. Make it again with pretrain."


def is_network(folder: Path) -> bool:
    """Whether a folder holds a network of this project."""
    return KEY in described(folder)


def network_of(folder: Path) -> Network:
    """What a folder's network is made of.

    Raises:
        NetworkError: It does not say that.
    """
    from pydantic import TypeAdapter, ValidationError  # language models need none of it

    try:
        made: Network = TypeAdapter(Network).validate_python(described(folder).get(KEY))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"describes its network wrongly in {REWRITES} ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        raise NetworkError(str(folder), what, "the fields of this version") from error
    return made


def labels_of(folder: Path) -> tuple[str, ...]:
    """What a network tells, in the order of its logits.

    Raises:
        NetworkError: It does not say that.
    """
    labels = described(folder).get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise NetworkError(str(folder), f"has no 'labels' in its {REWRITES}", "a list of their names")
    return tuple(labels)


def shape_of(folder: Path) -> tuple[int, int, int]:
    """Channels, height and width of the images that a network takes.

    Raises:
        NetworkError: It does not say that.
    """
    shape = described(folder).get("shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise NetworkError(str(folder), f"has no 'shape' in its {REWRITES}", "channels, height and width")
    channels, height, width = shape
    return channels, height, width


def outline(folder: Path) -> ImageNetwork:
    """The network that a folder describes, without memory for its weights.

    Raises:
        NetworkError: It describes none.
    """
    with torch.device("meta"):
        return ImageNetwork(network_of(folder), shape_of(folder), len(labels_of(folder)))


def load(folder: Path) -> ImageNetwork:
    """The network in a folder, in float32, on the CPU, in evaluation mode.

    Raises:
        NetworkError: It describes none, or its tensors do not fit.
    """
    made = outline(folder).to_empty(device="cpu").eval()
    stored = Weights(folder)
    wanted = made.state_dict()
    for name in sorted(wanted.keys() | stored.headers.keys()):
        if name not in stored.headers or name not in wanted:
            which = "no" if name in wanted else "a"
            raise NetworkError(str(folder), f"has {which} tensor {name!r}", "those of the network that it describes")
        if (got := stored.headers[name].shape) != (right := tuple(wanted[name].shape)):
            raise NetworkError(str(folder), f"has {name!r} of shape {got}", f"{right}, as it describes it")
    made.load_state_dict({name: stored.read(name).to(wanted[name].dtype) for name in wanted})
    return made


def save(model: ImageNetwork, weights: Mapping[str, Tensor], labels: Sequence[str], folder: Path) -> None:
    """Write a network; what is not among `weights` is as it is in `model`."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: value.detach().cpu().contiguous() for name, value in {**model.state_dict(), **weights}.items()}
    save_file(whole, folder / f"{STEM}.safetensors")
    network = model.network
    fields = {"kind": network.kind, "widths": list(network.widths), "batchnorm": network.batchnorm}
    said = {KEY: fields, "shape": list(model.shape), "labels": list(labels)}
    (folder / REWRITES).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


def unsplittable(network: Network, training: Training, resources: Resources) -> Iterator[str]:
    """Why a network is not to be trained so, a clause each."""
    if not network.batchnorm:
        return
    why = "Its batch normalisation takes a batch as a whole"
    if resources.most > 1 or resources.strategy != "single":
        asked = f"workers={resources.spoken} with strategy={resources.strategy!r}"
        yield f"{asked}, expected one and 'single'. {why}: leave them out, or take a network with batchnorm: false."
    if training.micro_batch_size not in (None, training.batch_size):
        yield f"micro_batch_size={training.micro_batch_size}, expected none. {why}: leave it out."


def tells_otherwise(teacher: Path, student: Path) -> Iterator[str]:
    """What a student tells or takes otherwise than its teacher, a clause each."""
    for what, of in (("tells the labels", labels_of), ("takes images of shape", shape_of)):
        told, wanted = of(student), of(teacher)
        if told != wanted:
            yield f"student: it {what} {told!r}, expected the teacher's, {wanted!r}. Take another student."


def fitting(images: Images, shape: tuple[int, int, int], where: str) -> Images:
    """The same images, which have to be of that shape.

    Raises:
        DatasetError: They are of another one.
    """
    if images.shape != shape:
        what = f"holds images of shape {images.shape}, expected {shape} as the network takes them"
        raise DatasetError(where, what, "Bring them to that size.")
    return images


class LabelLoss(nn.Module):
    """Cross entropy of an image's label.

    Attributes:
        model: What learns.
    """

    def __init__(self, model: ImageNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's images."""
        features, labels = seen(self.model, batch)
        return nn.functional.cross_entropy(self.model.head(features), labels, reduction="sum")


def seen(model: ImageNetwork, batch: Batch) -> tuple[Float[Tensor, "images width"], Int[Tensor, "images"]]:
    """What goes into a network's head for a batch's images, and the numbers of their labels."""
    assert isinstance(batch.rows, ImageRows)
    pixels = torch.from_numpy(batch.rows.pixels[batch.where]).to(batch.ids.device)
    labelled = batch.targets[:, 0] != IGNORED  # a worker without work gets a row without a label
    return model.features(pixels)[labelled], batch.targets[labelled, 0]
