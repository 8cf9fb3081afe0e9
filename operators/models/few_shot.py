"""Models and rows as meta-learning sees them: what is called with examples, and what in it is learnt."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lfm.errors import HyperparameterError
from lfm.meta.base import Episode, Examples, Meta
from lfm.networks import ImageNetwork
from operators.artifact import Dataset
from operators.data.batches import IGNORED, Batch, Document, Rows, documents, on_device, packed
from operators.data.episodes import Deck, Drawn, FewShot, Numbers
from operators.data.images import ImageRows, image_rows, read_images
from operators.data.row_files import DatasetError
from operators.data.rows import Form, read_rows
from operators.models.language_models import CALLED, Architecture, head_of, load_tokenizer
from operators.models.networks import fitting
from operators.models.objectives import answers, plain

FORMS: Mapping[Architecture, Form] = {"network": Form.IMAGE, "decoder": Form.LABELLED}
"""What episodes are drawn from, for each model that knows them."""


class TokenLogits(nn.Module):
    """A causal language model that tells of a batch only what is a loss token.

    Attributes:
        model: Who is asked.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = [head_of(plain(model))]  # in a list: a submodule of the model must not be one of this module too

    def forward(self, batch: Batch) -> Float[Tensor, "targets vocabulary"]:
        """The logits of the batch's loss tokens, in its order."""
        hidden, _ = answers(self.model, batch, packed=False)
        head = self.head[0]
        return head.shaped(head.linear(hidden))


@dataclass(frozen=True, slots=True)
class Tasks:
    """Rows, and the episodes that are drawn from them.

    Attributes:
        rows: Images, or texts in a row each.
        deck: Their numbers by label.
    """

    rows: Rows
    deck: Deck

    def episode(self, drawn: Drawn, device: torch.device) -> Episode:
        """What a method sees of an episode."""
        return Episode(self._examples(drawn.support, device), self._examples(drawn.query, device))

    def targets(self, numbers: Numbers) -> "np.ndarray[Any, np.dtype[np.int32]]":
        """What is to be told of some examples, in order, by class: the class of an image, each token of a text."""
        if isinstance(self.rows, ImageRows):
            return np.arange(len(numbers), dtype=np.int32).repeat(numbers.shape[1])
        return self.rows.targets[numbers.reshape(-1)].reshape(-1)

    def digest(self, drawn: Sequence[Drawn]) -> str:
        """Of what episodes show and ask, so that two results can be known to be about the same ones."""
        found = hashlib.sha256(np.ascontiguousarray(self._shown).tobytes())
        for one in drawn:
            found.update(one.support.tobytes() + one.query.tobytes())
        return found.hexdigest()

    @property
    def _shown(self) -> "np.ndarray[Any, Any]":
        return self.rows.pixels if isinstance(self.rows, ImageRows) else self.rows.ids

    def _examples(self, numbers: Numbers, device: torch.device) -> Examples:
        if isinstance(self.rows, ImageRows):
            images = torch.from_numpy(self.rows.pixels[numbers.reshape(-1)])
            return Examples(images.to(device), torch.from_numpy(self.targets(numbers)).long().to(device))
        batch = on_device(self.rows, numbers.reshape(-1), device)
        return Examples(batch, batch.targets[batch.targets != IGNORED])


def tasks_of(model: Any, home: Path, dataset: Dataset, few_shot: FewShot, length: int) -> Tasks:
    """Tasks for a model: of telling images apart, or of saying what texts of one label say.

    Args:
        model: A network for images or a causal language model.
        home: The folder with the latter's tokenizer.
        dataset: Images, or texts with labels.
        few_shot: What an episode is made of.
        length: Tokens of a row; what is longer loses its end.

    Raises:
        DatasetError: Images are of another size, a text is empty, or there are too few labels or examples of one.
        NoLossToken: All texts are empty.
    """
    if isinstance(model, ImageNetwork):
        images = fitting(read_images(dataset), model.shape, dataset.uri)
        return Tasks(image_rows(images, [0] * len(images)), Deck(images.labels, few_shot, dataset.uri))
    columns = read_rows(dataset, forms=(Form.LABELLED,)).to_pydict()
    tokenizer = load_tokenizer(home)
    whole = list(documents({"text": columns["text"]}, tokenizer))
    found = (Document(document.ids[:length], document.answer[:length]) for document in whole)
    rows = packed(found, length=length, padding=tokenizer.pad_token_id, packing=False, where=dataset.uri)
    if rows.left_out:  # what follows goes by the numbers of the texts
        what = f"has {rows.left_out} texts without a token to tell from another, expected none"
        raise DatasetError(dataset.uri, what, "Leave them out.")
    rows = replace(rows, cut=sum(len(document.ids) > length for document in whole))
    return Tasks(rows, Deck(columns["label"], few_shot, dataset.uri))


def asked_of(model: Any) -> nn.Module:
    """What a method calls with examples: a network itself, a language model for the logits of what is asked."""
    return model if isinstance(model, ImageNetwork) else TokenLogits(model)


def with_ways(network: ImageNetwork, ways: int, seed: int) -> ImageNetwork:
    """A network of so many classes: the head of one that tells another number of them is drawn anew from the seed."""
    if network.head.out_features != ways:
        torch.manual_seed(seed)
        network.head = nn.Linear(network.head.in_features, ways).to(network.head.weight)
    return network


def adapting(model: nn.Module) -> dict[str, Tensor]:
    """What of a model is learnt from a task, by name: all of a network, what LoRA added to a language model."""
    if isinstance(model, ImageNetwork):
        return dict(model.named_parameters())
    return {name: p for name, p in model.named_parameters() if "lora_" in name}  # as PEFT calls it


def unfit_episodes(what: Architecture, method: Meta, few_shot: FewShot) -> Iterator[str]:
    """What of a method and of its episodes is not for such a model, a clause each."""
    try:
        method.check(head=what == "network")
    except HyperparameterError as error:
        yield str(error)
    if what == "network" and few_shot.ways < 2:
        yield f"ways={few_shot.ways}, expected at least 2 for {CALLED[what]}, which tells labels apart. Raise it."
    if what == "decoder" and few_shot.ways != 1:
        yield f"ways={few_shot.ways}, expected 1 for {CALLED[what]}: the texts of one label are a task. Set it to 1."
