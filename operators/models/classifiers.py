"""Folders <-> classifiers of text, made of encoders that have no head yet; rows with a label as they take them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from operators.artifact import Dataset
from operators.data.batches import IGNORED, Batch, Rows
from operators.data.classes import distinct, numbered
from operators.data.rows import Form, read_rows
from operators.models.foreign_code import refuse_foreign_code
from operators.models.language_models import (
    UnsupportedModel,
    architecture_of,
    config_of,
    inject,
    refuse_ensembles,
    same,
)
from operators.models.objectives import plain
from operators.training import Training

HEADLESS = "it has no labels yet, expected a classifier"
GIVE_HEAD = "Tune it first with a method that gives a model, such as linear_probe or full."


def load(folder: Path, dtype: torch.dtype | None = None, labels: Sequence[str] = ()) -> Any:
    """The classifier in a folder, on the CPU, in evaluation mode; an encoder gets a head for `labels`.

    What is drawn for a new head comes from torch's generator. No code of the folder's own runs, and nothing is
    unpickled.

    Args:
        folder: The model's.
        dtype: Of its weights; None takes the one in which they are stored.
        labels: Those of a head that is new; what has a head keeps its own.

    Raises:
        ForeignCode: It cannot be loaded without running code.
        UnsupportedModel: It has no head and gets no labels, or its head tells something else than one label, or it is
            made of several models.
    """
    import transformers

    refuse_foreign_code(folder)
    refuse_ensembles(folder)
    made: dict[str, Any] = {}
    config = config_of(folder)
    if architecture_of(folder) != "classifier":
        if not labels:
            kind = str(config.get("model_type"))
            raise UnsupportedModel(kind, HEADLESS, GIVE_HEAD)
        made = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    elif config.get("problem_type") not in (None, "single_label_classification") or len(labels_of(folder)) < 2:
        what = f"its head tells {config.get('problem_type') or 'a number'}, expected one of several labels"
        raise UnsupportedModel(str(config.get("model_type")), what, "Tune an encoder instead.")
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False, use_safetensors=True, **made
    )


def labels_of(folder: Path) -> tuple[str, ...]:
    """A classifier's labels in the order of its head's outputs; none of a model that has no head for them."""
    if architecture_of(folder) != "classifier":
        return ()
    named = config_of(folder).get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # a config leaves out two of no name
    return tuple(str(named[number]) for number in sorted(named, key=int))


def add(model: Any, kind: str, fields: Mapping[str, Any]) -> Any:
    """A `PeftModel` around a classifier, which it changes in place; the head learns whole and goes along."""
    head = [n for n, part in model.named_children() if n != model.base_model_prefix and [*part.parameters()]]
    return inject(
        model,
        kind,
        {**fields, "modules_to_save": head, "exclude_modules": rf"(?:.*\.)?(?:{'|'.join(head)})(?:\..*)?"},
        task="SEQ_CLS",
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a classifier's or an encoder's folder, which has to know what padding is."""
    import transformers

    refuse_foreign_code(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        raise UnsupportedModel(folder.name, "its tokenizer has no padding token", "Set pad_token in its config.")
    return tokenizer


def labelled_rows(dataset: Dataset, tokenizer: Any, labels: Sequence[str], training: Training) -> Rows:
    """Rows of a text each, whose loss token is the number of its label; what is longer than a row loses its end.

    Raises:
        UnknownName: A label is none of `labels`.
    """
    columns = read_rows(dataset, forms=(Form.LABELLED,)).to_pydict()
    return rows_of(columns["text"], numbered(columns["label"], labels, dataset.uri), tokenizer, training.length)


def rows_of(texts: Sequence[str], numbers: Sequence[int], tokenizer: Any, length: int) -> Rows:
    """Tokenize texts with what the tokenizer puts around each, one to a row."""
    whole = tokenizer(list(texts), verbose=False)["input_ids"]
    fitting = tokenizer(list(texts), truncation=True, max_length=length, verbose=False)["input_ids"]
    shape = (len(fitting), length)
    ids, targets = np.full(shape, tokenizer.pad_token_id, np.int32), np.full(shape, IGNORED, np.int32)
    for i, (tokens, number) in enumerate(zip(fitting, numbers, strict=True)):
        ids[i, : len(tokens)] = tokens
        targets[i, max(1, len(tokens)) - 1] = number  # of an empty text the padding is asked
    positions = np.tile(np.arange(length, dtype=np.int32), (len(fitting), 1))
    return Rows(ids, positions, targets, cut=sum(len(ids) > length for ids in whole))


def labels_in(dataset: Dataset) -> tuple[str, ...]:
    """The labels of a data set of texts, sorted.

    Raises:
        DatasetError: There is only one.
    """
    return distinct(read_rows(dataset, forms=(Form.LABELLED,))["label"].to_pylist(), dataset.uri)


class LabelLoss(nn.Module):
    """Cross entropy of the label.

    Attributes:
        model: What learns.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """The sum over the batch's labels."""
        logits, labels = told_of(self.model, batch)
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def told_of(model: Any, batch: Batch) -> tuple[Float[Tensor, "labelled labels"], Int[Tensor, "labelled"]]:
    """A classifier's logits for the rows that have a label, and these labels; what follows a text's end is masked."""
    labelled = batch.targets != IGNORED
    last = labelled.int().argmax(dim=1, keepdim=True)
    seen = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None] <= last
    logits = plain(model)(input_ids=batch.ids, attention_mask=seen.long()).logits
    return logits[labelled.any(dim=1)], batch.targets[labelled]


@torch.no_grad()
def check(model: Any, tokenizer: Any) -> None:
    """Ask the model about a short text alone and beside a longer one, so that padding is known to change nothing.

    Raises:
        UnsupportedModel: It does.
    """
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.all_special_ids][:8]
        padded = torch.tensor([ids, ids[:3] + [tokenizer.pad_token_id] * (len(ids) - 3)], device=device)
        mask = torch.ones_like(padded)
        mask[1, 3:] = 0
        alone = model(input_ids=padded[1:, :3], attention_mask=mask[1:, :3]).logits[0]
        beside = model(input_ids=padded, attention_mask=mask).logits[1]
        if not same(beside, alone):
            fix = "Set pad_token_id in its config to that of its tokenizer."
            raise UnsupportedModel(model.config.model_type, "padding changes what it tells of a text", fix)
    finally:
        model.train(training)
