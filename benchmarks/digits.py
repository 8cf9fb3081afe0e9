"""Scikit-learn's handwritten digits -> images and labels."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from image_files import kept
from sklearn.datasets import load_digits

from operators.data.images import Images

TEST = 360  # digits
BRIGHTEST = 16  # of the numbers that scikit-learn gives


def write(data: Path, folder: Path, seeds: Iterable[int]) -> None:
    """What `configurations/deep_inversion.yaml` and `dfme.yaml` take: ``train``, and ``test``, a fifth of 1797 digits.

    They come with scikit-learn, not from the folder of real data, and are the same for all seeds.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for name, chosen in (("train", order[TEST:]), ("test", order[:TEST])):
        pixels = (digits.images[chosen, None] / BRIGHTEST).astype(np.float32)
        kept(folder / name, Images(pixels, tuple(map(str, digits.target[chosen]))))
