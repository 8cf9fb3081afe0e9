"""What answers for a model, with what is kept beside it: a memory, or a datastore."""

from typing import Any

import torch

from operators.artifact import Datastore, Memory, Model
from operators.engines.native import Native
from operators.models.datastore_files import not_both, opened, unfit
from operators.models.ensembles import load_decoder
from operators.models.language_models import load_tokenizer
from operators.models.memory_files import consult

CPU = torch.device("cpu")


def consulting(whole: Any, tokenizer: Any, datastore: Datastore | None) -> Native:
    """What answers for a model, with what a datastore of it has; whether it is of this model `unfit` tells."""
    if datastore is None:
        return Native(whole, tokenizer)
    method, search = opened(datastore)
    return Native(whole, tokenizer, retrieve=method, search=search)


def engine_of(
    model: Model,
    memory: Memory | None = None,
    datastore: Datastore | None = None,
    *,
    device: torch.device = CPU,
) -> Native:
    """What answers for a model in its stored dtype, and consults its memory or its datastore where it has one.

    Args:
        model: The model.
        memory: What it consults while it answers.
        datastore: With what that is mixed.
        device: Where it computes.

    Raises:
        OtherMemory: The memory was not made for this very model.
        OtherModel: The datastore was not.
        DatastoreError: Both are given, or the datastore cannot be read.
    """
    if memory is not None and datastore is not None:
        raise not_both("model")
    whole = load_decoder(model.path).to(device)
    if memory is not None:
        consult(whole, memory, model)
    for problem in () if datastore is None else unfit("model", datastore, model):
        raise problem
    return consulting(whole, load_tokenizer(model.path), datastore)
