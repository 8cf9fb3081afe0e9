"""A dataset, tokenized and packed."""

from typing import Any

from operators.artifact import Dataset
from operators.batches import Rows, documents, packed
from operators.rows import read_rows
from operators.training import Training


def packed_rows(dataset: Dataset, tokenizer: Any, training: Training) -> Rows:
    """What a step trains on or looks at.

    Raises:
        NoLossToken: There is nothing to learn in it.
    """
    return packed(
        documents(read_rows(dataset).to_pydict(), tokenizer),
        length=training.length,
        padding=tokenizer.pad_token_id,
        packing=training.packing,
        where=dataset.uri,
    )
