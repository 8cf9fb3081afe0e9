"""What makes pixels look like what a network was trained on: its own memory of that, and what images are like."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lfm.networks import BATCHNORM


class NormStatistics:
    """How far what goes into a network's batch normalisation is from what it saw in training.

    Attributes:
        distances: Of each normalisation that the last pass went through, in order: the distance between the two means
            plus that between the two variances, which are those of the batch over all places, biased.
    """

    def __init__(self) -> None:
        self.distances: list[Tensor] = []

    def loss(self) -> Float[Tensor, ""]:
        """Their sum."""
        return torch.stack(self.distances).sum()

    def _see(self, norm: Any, given: tuple[Tensor, ...]) -> None:
        (x,) = given
        over = [d for d in range(x.ndim) if d != 1]
        mean, variance = x.mean(dim=over), x.var(dim=over, unbiased=False)
        self.distances.append(_length(mean - norm.running_mean) + _length(variance - norm.running_var))


def _length(x: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(x)
    return found


@contextmanager
def norm_statistics(model: nn.Module) -> Iterator[NormStatistics]:
    """Watch a model's batch normalisation; its passes change nothing of it as long as it is in evaluation mode."""
    found = NormStatistics()

    def begin(*_: object) -> None:
        found.distances.clear()

    norms = [m for m in model.modules() if isinstance(m, BATCHNORM)]
    handles = [model.register_forward_pre_hook(begin)]
    handles += [norm.register_forward_pre_hook(found._see) for norm in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def total_variation(images: Float[Tensor, "images channels height width"]) -> Float[Tensor, ""]:
    """How rough images are: the lengths of all differences to the right, down and along both diagonals, summed."""
    right = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    return torch.stack([_length(d) for d in (right, down, falling, rising)]).sum()
