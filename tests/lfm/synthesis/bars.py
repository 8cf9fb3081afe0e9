"""Images that a small network learns in a moment: a bar that lies, stands or crosses."""

import torch
from torch import Tensor
from torch.nn import functional

from lfm.networks import ImageNetwork, Network

SHAPE = (1, 6, 6)


def bars(many: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and which of the three kinds each is."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(many) % 3
    images = torch.rand((many, *SHAPE), generator=draw) * 0.3
    for image, label, at in zip(images, labels.tolist(), torch.randint(6, (many,), generator=draw), strict=True):
        if label != 1:
            image[0, at] += 0.7
        if label != 0:
            image[0, :, at] += 0.7
    return images.clamp(0, 1), labels


def trained(network: Network, steps: int = 60) -> ImageNetwork:
    """A network that has learnt them, in evaluation mode; the generator of all stays as it was."""
    images, labels = bars(240)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ImageNetwork(network, SHAPE, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(steps):
        chosen = slice(step * 40 % 240, step * 40 % 240 + 40)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()
