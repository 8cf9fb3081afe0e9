"""The network that draws images, of which every method with a generator has one."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Generator(nn.Module):
    """Noise -> images before their last nonlinearity, by two doublings of a small picture.

    A matrix makes a picture of a quarter of the image's sides with `2 * width` channels; then twice: double the sides,
    convolve, normalise over the batch. The last convolution's output is normalised too, so that images keep their
    contrast whatever the weights do.

    Attributes:
        size: Height and width of an image.
        latent: Numbers of noise for each image.
    """

    def __init__(self, shape: tuple[int, int, int], *, latent: int, width: int) -> None:
        """Weights are drawn from torch's generator."""
        super().__init__()
        channels, *self.size = shape
        self.latent, self.width = latent, width
        self.small = [-(-side // 4) for side in self.size]
        self.first = nn.Linear(latent, 2 * width * self.small[0] * self.small[1])
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (2 * width, 2 * width, width, channels))
        ends = ((2 * width, 2 * width), (2 * width, width), (width, channels))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ends)

    def forward(self, noise: Float[Tensor, "images latent"]) -> Float[Tensor, "images channels height width"]:
        """Numbers of any size: `pixels` makes images of them."""
        x = self.norms[0](self.first(noise).view(len(noise), 2 * self.width, *self.small))
        halves = [-(-side // 2) for side in self.size]
        for size, convolution, norm in zip((halves, self.size), self.convolutions, self.norms[1:], strict=False):
            x = functional.leaky_relu(norm(convolution(functional.interpolate(x, size=size))), 0.2)
        return self.norms[3](self.convolutions[2](x))  # type: ignore[no-any-return]


def pixels(x: Tensor) -> Tensor:
    """Any numbers into [0, 1]."""
    return (torch.tanh(x) + 1) / 2
