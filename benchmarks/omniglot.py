"""Omniglot's drawings -> images of 28 x 28 with a label each, for `configurations/maml.yaml`.

    python benchmarks/omniglot.py FOLDER    # reads $LFM_DATA/omniglot/images_background_small1.zip

FOLDER gets ``train`` and ``held_out``, which has the alphabets that no model is to see before. A label is an alphabet
and a character. As few-shot learning does it, what is trained on is turned by 90, 180 and 270 degrees too, which makes
other characters of it.
"""

import argparse
import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from operators.data.images import Images, Pixels, write_images

SIDE = 28
HELD_OUT = ("Greek", "Latin")


def drawings(archive: Path) -> Iterator[tuple[str, str, Pixels]]:
    """Alphabet, character and the ink of each drawing, from 0 to 1."""
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(n for n in opened.namelist() if n.endswith(".png")):
            _, alphabet, character, _ = PurePosixPath(name).parts
            with Image.open(io.BytesIO(opened.read(name))) as image:
                small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
            yield alphabet, character, (1 - np.asarray(small, np.float32) / np.float32(255))[None]


def turned(found: Sequence[tuple[str, str, Pixels]]) -> Iterator[tuple[str, Pixels]]:
    """Each drawing in four directions, which are four labels."""
    for alphabet, character, ink in found:
        for quarters in range(4):
            yield f"{alphabet}/{character}/{90 * quarters}", np.rot90(ink, quarters, axes=(1, 2))


def write(rows: Sequence[tuple[str, Pixels]], folder: Path) -> None:
    """A data set of images in a new folder."""
    write_images(Images(np.stack([ink for _, ink in rows]), tuple(label for label, _ in rows)), folder)


def main() -> None:
    """Write both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--held-out", nargs="+", default=HELD_OUT, help="alphabets that are not trained on")
    asked = parser.parse_args()
    found = list(drawings(Path(os.environ["LFM_DATA"]) / "omniglot" / "images_background_small1.zip"))
    known = {alphabet for alphabet, _, _ in found}
    if unknown := set(asked.held_out) - known:
        parser.error(f"no alphabet is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    write([*turned([one for one in found if one[0] not in asked.held_out])], asked.folder / "train")
    held_out = [(f"{alphabet}/{character}", ink) for alphabet, character, ink in found if alphabet in asked.held_out]
    write(held_out, asked.folder / "held_out")


if __name__ == "__main__":
    main()
