"""Networks to align: chains, one with a residual stream, and the same ones with their units in another order."""

import torch
from torch import nn

from lfm.alignment.base import Permutations
from lfm.networks import ImageNetwork, Network

SHAPE = (2, 8, 8)
STREAM = {
    "stream": [["enter.weight", 0], ["enter.bias", 0], ["down.weight", 0], ["down.bias", 0], ["up.weight", 1],
               ["leave.weight", 1]],
    "hidden": [["up.weight", 0], ["up.bias", 0], ["down.weight", 1]],
}  # fmt: skip
"""The groups of a `Residual`."""


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 6), nn.Linear(6, 3)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        x = self.enter(x)
        return self.leave(x + self.down(torch.relu(self.up(x))))


def made(kind, widths=(6, 7, 5), *, seed=0, batchnorm=True):
    """A network that has seen something, so that its running statistics are no round numbers."""
    torch.manual_seed(seed)
    network = ImageNetwork(Network(kind=kind, widths=widths, batchnorm=batchnorm), SHAPE, 4, mean=(0.5, 0.4))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in network.layers:
            if batchnorm:
                part.norm.weight.uniform_(0.5, 2, generator=draw)
                part.norm.bias.normal_(generator=draw)
        network(torch.rand(40, *SHAPE, generator=draw))
    return network.eval()


def shuffled(spec, tensors, seed=0):
    """Permutations drawn anew."""
    draw = torch.Generator().manual_seed(seed)
    same = Permutations.none(spec, tensors)
    return Permutations(spec, {n: torch.randperm(len(o), generator=draw) for n, o in same.orders.items()})
