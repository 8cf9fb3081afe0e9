"""Gradients of what can only be evaluated."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def forward_differences(
    f: Callable[[Tensor], Tensor],
    x: Float[Tensor, "points *shape"],
    directions: Float[Tensor, "directions points *shape"],
    *,
    step: float,
) -> Float[Tensor, "points *shape"]:
    """An estimate of each point's gradient from one value at the point and one a step away along each direction.

    It is `d / m * sum of (f(x + step * u) - f(x)) / step * u` over the `m` directions `u`, for points of `d` numbers.
    Where `f` is linear it is right in the mean over directions drawn evenly from the sphere, and exact for an
    orthonormal basis.

    Args:
        f: Gives one value for each of any number of points; asked once about `points * (directions + 1)`.
        x: The points.
        directions: Of length 1.
        step: How far from the point, above 0.
    """
    values = f(torch.cat([x[None], x + step * directions]).flatten(0, 1)).view(1 + len(directions), len(x))
    slopes = (values[1:] - values[0]) / step
    numbers = x[0].numel()
    return numbers * (slopes.view(*slopes.shape, *[1] * (x.ndim - 1)) * directions).mean(dim=0)
