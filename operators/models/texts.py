"""A dataset, tokenized and packed; what can be known of it before."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lfm.errors import HyperparameterError, LfmError
from operators.artifact import Dataset
from operators.data.batches import Rows, documents, packed
from operators.data.rows import SPOKEN, Form, columns_of, form_of, other_form, read_rows
from operators.models.language_models import CALLED, Architecture, architecture_of, config_of
from operators.models.networks import is_network
from operators.training import Training

CONTEXT = ("max_position_embeddings", "n_positions")  # what a config calls the longest row of its model


def packed_rows(dataset: Dataset, tokenizer: Any, training: Training) -> Rows:
    """What a step trains on or looks at.

    Raises:
        NoLossToken: There is nothing to learn in it.
    """
    return packed(
        documents(read_rows(dataset, forms=SPOKEN).to_pydict(), tokenizer),
        length=training.length,
        padding=tokenizer.pad_token_id,
        packing=training.packing,
        where=dataset.uri,
    )


def unfit(
    training: Training,
    model: Path | None,
    data: Mapping[str, Dataset | None],
    forms: Collection[Form] | None = None,
) -> Iterator[str]:
    """What headers tell is wrong with data and the model that is to learn from them, a clause each.

    Args:
        training: How it is trained.
        model: The model's folder, or None where it is not here yet.
        data: Sets by the name of their parameter, None where one is not here yet.
        forms: What rows may be; None takes what the model learns from.
    """
    if model is not None:
        yield from _unfit_model(training, model, forms)
    fitting = forms or (tuple(Form) if model is None else forms_for(architecture_of(model)))
    for name, dataset in data.items():
        if dataset is None:
            continue
        try:
            form = form_of(columns_of(dataset.uri), dataset.uri)
        except LfmError as error:
            yield f"{name}: {error}"
            continue
        if form not in fitting:
            what, fix = other_form(form, fitting)
            yield f"{name}: {dataset.uri} {what}{_of(model)}. {fix}"
        elif form is Form.CONVERSATION and model is not None and not _has_template(model):
            fix = "Use an instruction-tuned model, or data with 'prompt' and 'completion'."
            yield f"{name}: {dataset.uri} holds conversations and the model no chat template, expected one. {fix}"


def forms_for(what: Architecture) -> tuple[Form, ...]:
    """What rows such a model learns from and is measured on."""
    if what == "network":
        return (Form.IMAGE,)
    return SPOKEN if what == "decoder" else (Form.LABELLED,)


def _of(model: Path | None) -> str:
    """The model that rows are for, where it says what it is."""
    return "" if model is None else f" for {CALLED[architecture_of(model)]}"


def _unfit_model(training: Training, model: Path, forms: Collection[Form] | None) -> Iterator[str]:
    if not (model / "config.json").is_file() and not is_network(model):
        yield f"model: {str(model)!r} has no config.json, expected a folder that from_pretrained loads. Check the path."
        return
    what = architecture_of(model)
    if forms is not None and not set(forms) & set(forms_for(what)):
        wanted = next(a for a in CALLED if set(forms) & set(forms_for(a)))
        yield f"model: {str(model)!r} is {CALLED[what]}, expected {CALLED[wanted]}. Give another."
    longest = None if what == "network" else longest_row(model)
    if longest is not None and training.length > longest:
        yield f"length={training.length}, expected at most the {longest} tokens that the model is made for. Lower it."


def longest_row(model: Path) -> int | None:
    """How many tokens a model is made for; None where its config does not say."""
    config = config_of(model)
    return next((config[key] for key in CONTEXT if config.get(key)), None)


def check_length(verb: str, length: int, longest: int | None) -> None:
    """Raise `HyperparameterError` for rows longer than a model is made for."""
    if longest is not None and length > longest:
        raise HyperparameterError(verb, "length", length, f"length <= {longest}, the model's context")


def _has_template(model: Path) -> bool:
    if (model / "chat_template.jinja").is_file() or (model / "chat_template.json").is_file():
        return True
    config = model / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))
