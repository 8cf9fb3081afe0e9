"""Small networks for images: each layer widens or narrows what it sees, and a linear head tells classes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lfm.errors import HyperparameterError
from lfm.method import FIELDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What a network is made of, whatever images it will see.

    Attributes:
        kind: ``cnn``: blocks of a 3 x 3 convolution, batch normalisation, ReLU and a 2 x 2 maximum, as few-shot
            learning knows them; ``mlp``: matrices over all pixels, with ReLU.
        widths: The channels of each block, or how wide each hidden layer is.
        batchnorm: Normalise what each layer gives over the batch.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FIELDS

    kind: Literal["cnn", "mlp"] = "cnn"
    widths: tuple[int, ...] = (32, 32, 32, 32)
    batchnorm: bool = True

    def __post_init__(self) -> None:
        self._require(self.kind in ("cnn", "mlp"), "kind", "one of cnn, mlp")
        self._require(bool(self.widths) and all(w >= 1 for w in self.widths), "widths", "numbers of at least 1")

    def _require(self, holds: bool, field: str, allowed: str) -> None:
        if not holds:
            raise HyperparameterError(type(self).__name__, field, getattr(self, field), allowed)


class Layer(nn.Module):
    """One hidden layer of an `ImageNetwork`.

    Attributes:
        weights: Its matrix or convolution, with a bias.
        norm: What normalises its output over the batch; nothing where the network has none.
    """

    def __init__(self, weights: nn.Linear | nn.Conv2d, norm: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.weights, self.norm, self.pool = weights, norm, pool

    def forward(self, x: Tensor) -> Tensor:
        """What it makes of the layer before."""
        return self.pool(torch.relu(self.norm(self.weights(x))))  # type: ignore[no-any-return]


class ImageNetwork(nn.Module):
    """Images -> logits.

    Attributes:
        network: What it is made of.
        shape: Of an image: channels, height, width.
        layers: The hidden layers, in order.
        head: The linear map from features to logits.
        mean: Of each channel's pixels; subtracted first.
        deviation: Of each channel's pixels; divides them then.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        network: Network,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        mean: Sequence[float] = (),
        deviation: Sequence[float] = (),
    ) -> None:
        """Weights are drawn from torch's generator.

        Args:
            network: What it is made of.
            shape: Of an image: channels, height, width.
            num_classes: How many logits.
            mean: A number for each channel; none leaves pixels as they are.
            deviation: The same; above 0.
        """
        super().__init__()
        self.network, self.shape = network, shape
        channels = shape[0]
        self.register_buffer("mean", torch.tensor(mean or [0.0] * channels).reshape(-1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation or [1.0] * channels).reshape(-1, 1, 1))
        build = _convolutions if network.kind == "cnn" else _matrices
        made, width = build(network, shape)
        self.layers = nn.ModuleList(made)
        self.head = nn.Linear(width, num_classes)

    def features(self, images: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images width"]:
        """What goes into the head: an embedding of each image."""
        x = (images - self.mean) / self.deviation
        if self.network.kind == "mlp":
            x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1)

    def forward(self, images: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images classes"]:
        """The logits."""
        return self.head(self.features(images))  # type: ignore[no-any-return]


def _convolutions(network: Network, shape: tuple[int, int, int]) -> tuple[list[Layer], int]:
    before, *sides = shape
    made = []
    for width in network.widths:
        norm = nn.BatchNorm2d(width) if network.batchnorm else nn.Identity()
        halved = min(sides) >= 2
        made.append(Layer(nn.Conv2d(before, width, 3, padding=1), norm, nn.MaxPool2d(2) if halved else nn.Identity()))
        before, sides = width, [side // 2 for side in sides] if halved else sides
    return made, before * prod(sides)


def _matrices(network: Network, shape: tuple[int, int, int]) -> tuple[list[Layer], int]:
    before = prod(shape)
    made = []
    for width in network.widths:
        norm = nn.BatchNorm1d(width) if network.batchnorm else nn.Identity()
        made.append(Layer(nn.Linear(before, width), norm, nn.Identity()))
        before = width
    return made, before


BATCHNORM = nn.modules.batchnorm._BatchNorm  # what all of torch's batch normalisations are


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """What batch normalisation has seen, by name in the model: buffers that training moves without a gradient."""
    return {
        f"{name}.{kind}" if name else kind: value
        for name, module in model.named_modules()
        if isinstance(module, BATCHNORM)
        for kind, value in module.named_buffers(recurse=False)
    }


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode, none of whose parameters asks for a gradient; both as before afterwards."""
    modules = [(m, m.training) for model in models for m in model.modules()]
    asking = [p for model in models for p in model.parameters() if p.requires_grad]
    for module, _ in modules:
        module.training = False
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter in asking:
            parameter.requires_grad_(True)
