"""Scikit-learn's handwritten digits -> images and labels, for `configurations/deep_inversion.yaml` and `dfme.yaml`.

    python benchmarks/digits.py FOLDER

FOLDER gets ``train`` and ``test``, a fifth of the 1797 digits, drawn once.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from operators.data.images import Images, write_images

TEST = 360  # digits
BRIGHTEST = 16  # of the numbers that scikit-learn gives


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for name, chosen in (("train", order[TEST:]), ("test", order[:TEST])):
        pixels = (digits.images[chosen, None] / BRIGHTEST).astype(np.float32)
        write_images(Images(pixels, tuple(map(str, digits.target[chosen]))), folder / name)


if __name__ == "__main__":
    main()
