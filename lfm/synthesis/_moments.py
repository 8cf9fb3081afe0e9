"""What an optimizer remembers of a model's parameters, as tensors by name: part of a state between two rounds."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def moments(optimizer: torch.optim.Optimizer, model: nn.Module, name: str) -> dict[str, Tensor]:
    """All that it remembers, as ``<name>.<kind>.<parameter>``."""
    return {
        f"{name}.{kind}.{parameter}": value.detach()
        for parameter, p in model.named_parameters()
        for kind, value in optimizer.state[p].items()
        if isinstance(value, Tensor)
    }


def recall(optimizer: torch.optim.Optimizer, model: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Make a new optimizer remember it; where `state` has nothing of that name it stays new."""
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        if key.startswith(f"{name}."):
            _, kind, parameter = key.split(".", 2)
            optimizer.state[parameters[parameter]][kind] = value.clone()
