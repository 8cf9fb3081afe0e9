"""Omniglot's drawings -> images of 28 x 28 with a label each."""

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from image_files import kept
from PIL import Image

from operators.data.images import Images, Pixels

ARCHIVE = "omniglot/images_background_small1.zip"
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


def write(data: Path, folder: Path, seeds: Iterable[int]) -> None:
    """What `configurations/maml.yaml` takes: ``train``, and ``held_out``, the alphabets that no model sees before.

    A label is an alphabet and a character. As few-shot learning does it, what is trained on is turned by 90, 180 and
    270 degrees too, which makes other characters of it. All is the same for all seeds.
    """
    found = list(drawings(data / ARCHIVE))
    known = [one for one in found if one[0] not in HELD_OUT]
    strange = [(f"{alphabet}/{character}", ink) for alphabet, character, ink in found if alphabet in HELD_OUT]
    for name, rows in (("train", [*turned(known)]), ("held_out", strange)):
        kept(folder / name, Images(np.stack([ink for _, ink in rows]), tuple(label for label, _ in rows)))
