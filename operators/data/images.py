"""Data sets of images with a label each: files -> pixels, pixels -> rows that the loop takes, pixels -> files."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from operators.artifact import Dataset
from operators.data.batches import IGNORED, Rows
from operators.data.records import records
from operators.data.row_files import DatasetError
from operators.data.rows import COLUMNS, Form, check_form, empty, opened_as

Pixels = np.ndarray[Any, np.dtype[np.float32]]
ALLOWED = (
    "numbers from 0 to 1, height x width or channels x height x width, or the bytes of a PNG, alone or under 'bytes'"
)


@dataclass(frozen=True, slots=True)
class Images:
    """Images of one size.

    Attributes:
        pixels: Numbers from 0 to 1, of shape (images, channels, height, width).
        labels: One for each.
    """

    pixels: Pixels
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one of them: channels, height, width."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    @property
    def digest(self) -> str:
        """Of what is seen and expected, so that two results can be known to be about the same images."""
        found = hashlib.sha256(np.ascontiguousarray(self.pixels).tobytes())
        found.update("\0".join(self.labels).encode())
        return found.hexdigest()

    def first(self, number: int | None) -> "Images":
        """Only so many."""
        return Images(self.pixels[:number], self.labels[:number])


@dataclass(frozen=True, slots=True)
class ImageRows(Rows):
    """A row for each image, with one target: the number of its label. There are no tokens: `ids` are zeros.

    Attributes:
        pixels: The images, by the numbers of the rows.
    """

    pixels: Pixels = field(kw_only=True)


def read_images(dataset: Dataset) -> Images:
    """All images of a data set; grey ones have one channel, others three.

    Args:
        dataset: Rows of ``image`` and ``label`` in files as `read_rows` takes them.

    Raises:
        DatasetError: It is not there, cannot be read, holds something else, or images of several sizes.
    """
    form, _, files = opened_as(dataset, (Form.IMAGE,))
    pixels: list[Pixels] = []
    labels: list[str] = []
    for file in files:
        check_form(file, form, files[0])
        for where, record in records(file, set(COLUMNS[form])):
            pixels.append(_pixels(record.get("image"), where))
            labels.append(_label(record.get("label"), where))
            if pixels[-1].shape != pixels[0].shape:
                what = f"'image' is of shape {pixels[-1].shape}, expected {pixels[0].shape} as the first"
                raise DatasetError(where, what, "Bring all to one size.")
    if not pixels:
        raise empty(dataset.uri)
    return Images(np.stack(pixels), tuple(labels))


def image_rows(images: Images, numbers: Sequence[int]) -> ImageRows:
    """Rows for the loop.

    Args:
        images: What is seen.
        numbers: The number of each one's label.
    """
    nothing = np.zeros((len(images), 1), np.int32)
    targets = np.asarray(numbers, np.int32).reshape(-1, 1)
    assert (targets != IGNORED).all()
    return ImageRows(nothing, nothing, targets, pixels=images.pixels)


def write_images(images: Images, folder: Path) -> None:
    """Write a data set of one Parquet file into a new folder."""
    folder.mkdir(parents=True)
    values: Any = pa.array(images.pixels.reshape(-1))
    for size in reversed(images.shape):
        values = pa.ListArray.from_arrays(pa.array(range(0, len(values) + 1, size), pa.int32()), values)
    table = pa.table({"image": values, "label": pa.array(images.labels, pa.string())})
    pq.write_table(table, folder / "images.parquet")


def _label(value: object, where: str) -> str:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise DatasetError(where, f"'label' is {value!r}, expected a string or a whole number", "Correct the row.")


def _pixels(value: Any, where: str) -> Pixels:
    encoded = value.get("bytes") if isinstance(value, dict) else value  # as the hub's own images are kept
    if isinstance(encoded, bytes):
        return _decoded(encoded, where)
    try:
        found = np.asarray(value, np.float32)
    except (TypeError, ValueError):  # ragged, or no numbers
        found = np.empty(0, np.float32)
    found = found[None] if found.ndim == 2 else found
    if found.ndim != 3 or not found.size or not 0 <= found.min() <= found.max() <= 1:
        shown = repr(value)
        what = f"'image' is {shown[:60]}{'...' if len(shown) > 60 else ''}, expected {ALLOWED}"
        raise DatasetError(where, what, "Correct the row, or divide its numbers by their largest.")
    return found


def _decoded(encoded: bytes, where: str) -> Pixels:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            grey = opened.mode in ("1", "L")
            values = np.asarray(opened.convert("L" if grey else "RGB"), np.float32) / np.float32(255)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DatasetError(
            where, f"'image' holds bytes that are no image, expected {ALLOWED}", "Correct it."
        ) from error
    return values[None] if grey else np.ascontiguousarray(values.transpose(2, 0, 1))
