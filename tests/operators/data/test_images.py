"""Data sets of images."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.artifact import Dataset
from operators.data.images import Images, image_rows, read_images, write_images
from operators.data.row_files import DatasetError
from operators.data.rows import Form, columns_of, form_of, problems_of, read_rows
from tests.operators import small

PIXELS = np.random.default_rng(0).random((3, 2, 4, 5), np.float32)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(str(path))


def test_what_is_written_is_read_again_bit_by_bit(tmp_path):
    images = Images(PIXELS, ("b", "a", "b"))
    write_images(images, tmp_path / "images")
    read = read_images(Dataset(str(tmp_path / "images")))
    assert read.pixels.dtype == np.float32
    assert (read.pixels == PIXELS).all()
    assert read.labels == ("b", "a", "b")
    assert (read.shape, len(read), read.digest) == ((2, 4, 5), 3, images.digest)
    assert read.first(1).digest != images.digest
    assert Images(PIXELS, ("b", "a", "c")).digest != images.digest


def test_grey_numbers_have_one_channel_and_labels_may_be_numbers(tmp_path):
    grey = [[0, 0.5], [1, 0.25], [0, 0]]
    read = read_images(lines(tmp_path / "a.jsonl", {"image": grey, "label": 3}, {"image": [grey], "label": "x"}))
    assert read.labels == ("3", "x")
    assert read.pixels.tolist() == [[grey], [grey]]


def test_an_encoded_image_is_read_as_the_hub_keeps_it(tmp_path):
    grey = np.array([[0, 128, 255], [7, 8, 9]], np.uint8)
    colour = np.stack([grey, grey // 2, grey // 4], axis=-1)
    for name, values, mode in (("grey", grey, "L"), ("colour", colour, "RGB")):
        rows = [{"image": {"bytes": small.png(values), "path": None}, "label": 1}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        pixels = read_images(Dataset(str(tmp_path / f"{name}.parquet"))).pixels[0]
        wanted = values[None] if mode == "L" else values.transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels, wanted.astype(np.float32) / np.float32(255))


def test_rows_hold_a_number_for_each_label_and_no_tokens():
    rows = image_rows(Images(PIXELS, ("b", "a", "b")), [1, 0, 1])
    assert rows.targets.tolist() == [[1], [0], [1]]
    assert (rows.ids.shape, rows.loss_tokens, len(rows)) == ((3, 1), 3, 3)
    assert rows.pixels is PIXELS


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": [[0, 2]], "label": "a"}, r"'image' is \[\[0, 2\]\], expected numbers from 0 to 1"),
        ({"image": [[0], [0, 1]], "label": "a"}, "'image' is"),
        ({"image": "cat.png", "label": "a"}, "'image' is 'cat.png'"),
        ({"image": [[0, 1]], "label": None}, "'label' is None"),
        (
            {"image": [[0, 1], [0, 1]], "label": "a"},
            r"'image' is of shape \(1, 2, 2\), expected \(1, 1, 2\) as the first",
        ),
    ],
)
def test_a_row_that_is_no_image_is_named(tmp_path, row, said):
    with pytest.raises(DatasetError, match=rf"a\.jsonl:2: {said}"):
        read_images(lines(tmp_path / "a.jsonl", {"image": [[0, 1]], "label": "a"}, row))


def test_bytes_that_are_no_image_are_named(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"image": b"hello", "label": 1}]), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="holds bytes that are no image"):
        read_images(Dataset(str(tmp_path / "a.parquet")))


def test_text_and_images_are_not_taken_for_each_other(tmp_path):
    images = lines(tmp_path / "a.jsonl", {"image": [[0, 1]], "label": "a"})
    texts = lines(tmp_path / "b.jsonl", {"text": "hello", "label": "a"})
    assert form_of(columns_of(images.uri)) is Form.IMAGE
    assert list(problems_of(images)) == []
    with pytest.raises(DatasetError, match="holds 'image' rows, expected the columns 'text'"):
        read_rows(images)
    with pytest.raises(DatasetError, match="holds 'labelled' rows, expected the columns 'image' and 'label'"):
        read_images(texts)
