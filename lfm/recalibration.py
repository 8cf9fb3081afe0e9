"""What batch normalisation has seen, measured anew: after weights were averaged it is of neither model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lfm.networks import BATCHNORM


@torch.no_grad()
def recalibrate(model: nn.Module, ask: Callable[[], None]) -> int:
    """Set each running mean and variance to those of what the layer gets when the model is asked.

    Layer after layer in the order in which they are used, each behind layers that are done: so every one is exactly
    what the model has to normalise in evaluation, however the rows come in batches. As in torch the variance is the
    unbiased one. No parameter changes, nor what counts batches.

    Args:
        model: Changed in place.
        ask: Asks the model about all rows; called once for each layer.

    Returns:
        How many layers there are that were set.
    """
    training = model.training
    model.eval()
    remaining = [part for part in model.modules() if isinstance(part, BATCHNORM) and part.running_mean is not None]
    number = 0
    while remaining and (moments := _first_of(remaining, ask)).layer is not None:
        moments.settle()
        remaining.remove(moments.layer)
        number += 1
    model.train(training)
    return number


def _first_of(layers: list[Any], ask: Callable[[], None]) -> "Moments":
    """What goes into the layer among these that is used first."""
    moments = Moments()
    handles = [layer.register_forward_pre_hook(moments.look) for layer in layers]
    try:
        ask()
    finally:
        for handle in handles:
            handle.remove()
    return moments


class Moments:
    """Sums over all that goes into one layer, by channel, in float64.

    Attributes:
        layer: The first one that was used; None as long as none was.
    """

    def __init__(self) -> None:
        self.layer: Any = None
        self.number = 0
        self.total = self.squares = torch.zeros(())

    def look(self, layer: nn.Module, arguments: tuple[Tensor]) -> None:
        """Take what goes into a layer, if it is this one."""
        self.layer = self.layer or layer
        if layer is self.layer:
            values = arguments[0].double().transpose(0, 1).flatten(1)
            self.number += values.shape[1]
            self.total = self.total + values.sum(dim=1)
            self.squares = self.squares + values.square().sum(dim=1)

    def settle(self) -> None:
        """Write the mean and the variance into the layer."""
        mean = self.total / self.number
        variance = (self.squares / self.number - mean.square()) * self.number / max(1, self.number - 1)
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(variance.clamp(min=0))
