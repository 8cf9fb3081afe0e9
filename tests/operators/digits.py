"""Handwritten digits, and small networks: as they start, or after they have learnt digits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from lfm.networks import ImageNetwork, Network
from operators.artifact import Dataset, Model
from operators.data.images import Images, read_images, write_images
from operators.models.networks import save

SHAPE = (1, 8, 8)
LABELS = tuple(map(str, range(10)))
TRAINED = 1200  # of 1797; the others are held out


def sets(folder: Path) -> tuple[Dataset, Dataset]:
    """What networks learn from, and what is held out."""
    loaded = load_digits()
    pixels = (loaded.images[:, None] / 16).astype(np.float32)
    labels = tuple(map(str, loaded.target))
    for name, part in (("train", slice(0, TRAINED)), ("test", slice(TRAINED, None))):
        write_images(Images(pixels[part], labels[part]), folder / name)
    return Dataset(str(folder / "train")), Dataset(str(folder / "test"))


def learnt(folder: Path, data: Dataset, network: Network, *, seed: int, steps: int) -> Model:
    """A network that has followed Adam for some steps from a start of its own."""
    images = read_images(data)
    pixels = torch.from_numpy(images.pixels)
    right = torch.tensor([LABELS.index(label) for label in images.labels])
    torch.manual_seed(seed)
    made = ImageNetwork(network, SHAPE, len(LABELS))
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(steps):
        some = torch.randint(len(pixels), (64,))
        loss = nn.functional.cross_entropy(made(pixels[some]), right[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save(made, {}, LABELS, folder)
    return Model(str(folder))


def start(folder: Path, *, seed: int = 0, labels: Sequence[str] = ("column", "corner", "row"), **changes: Any) -> Model:
    """A network for images of 6 x 6 pixels whose batch normalisation has seen noise, and which has learnt nothing."""
    torch.manual_seed(seed)
    made = ImageNetwork(Network(**{"kind": "cnn", "widths": (4, 5), **changes}), (1, 6, 6), len(labels))
    made(torch.rand(20, 1, 6, 6))
    save(made, {}, labels, folder)
    return Model(str(folder))
