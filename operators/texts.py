"""A dataset, tokenized and packed; what can be known of it before."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lfm.errors import LfmError
from operators.artifact import Dataset
from operators.batches import Rows, documents, packed
from operators.language_models import config_of
from operators.rows import COLUMNS, Form, columns_of, form_of, read_rows
from operators.training import Training

CONTEXT = ("max_position_embeddings", "n_positions")  # what a config calls the longest row of its model


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


def unfit(
    training: Training,
    model: Path | None,
    data: Mapping[str, Dataset | None],
    forms: Collection[Form] = tuple(Form),
) -> Iterator[str]:
    """What headers tell is wrong with data and the model that is to learn from them, a clause each.

    Args:
        training: How it is trained.
        model: The model's folder, or None where it is not here yet.
        data: Sets by the name of their parameter, None where one is not here yet.
        forms: What rows may be.
    """
    if model is not None:
        yield from _unfit_model(training, model)
    for name, dataset in data.items():
        if dataset is None:
            continue
        try:
            form = form_of(columns_of(dataset.uri), dataset.uri)
        except LfmError as error:
            yield f"{name}: {error}"
            continue
        if form not in forms:
            wanted = " or ".join(" and ".join(map(repr, COLUMNS[f])) for f in forms)
            yield f"{name}: {dataset.uri} holds {form.value!r} rows, expected the columns {wanted}. Give others."
        elif form is Form.CONVERSATION and model is not None and not _has_template(model):
            fix = "Use an instruction-tuned model, or data with 'prompt' and 'completion'."
            yield f"{name}: {dataset.uri} holds conversations and the model no chat template, expected one. {fix}"


def _unfit_model(training: Training, model: Path) -> Iterator[str]:
    if not (model / "config.json").is_file():
        yield f"model: {str(model)!r} has no config.json, expected a folder that from_pretrained loads. Check the path."
        return
    config = config_of(model)
    longest = next((config[key] for key in CONTEXT if config.get(key)), None)
    if longest is not None and training.length > longest:
        yield f"length={training.length}, expected at most the {longest} tokens that the model is made for. Lower it."


def _has_template(model: Path) -> bool:
    if (model / "chat_template.jinja").is_file() or (model / "chat_template.json").is_file():
        return True
    config = model / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))
