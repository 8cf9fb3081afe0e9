"""Rows whose answer is one of a few words, and what a model that may only be asked says of these words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from operators.artifact import Dataset
from operators.data.batches import documents
from operators.data.row_files import DatasetError
from operators.data.rows import read_rows
from operators.models.language_models import head_of, trunk_of
from operators.models.soft_prompts import SoftPrompt, put_before


@dataclass(frozen=True, slots=True)
class Choices:
    """Rows, each a prompt and which of the labels answers it.

    Attributes:
        prompts: Token ids.
        labels: Which label is right, of shape (rows,).
        words: The labels' words, sorted.
        tokens: The first token of each, by which it is known.
    """

    prompts: Sequence[Sequence[int]]
    labels: Int[Tensor, "rows"]
    words: tuple[str, ...]
    tokens: tuple[int, ...]


def read_choices(dataset: Dataset, tokenizer: Any, *, room: int | None, like: Choices | None = None) -> Choices:
    """Pairs of prompt and completion, where each completion is a label's word.

    Args:
        dataset: The pairs.
        tokenizer: The model's.
        room: The most tokens of a prompt; None any number.
        like: Rows with the same labels, which these may not add to.

    Raises:
        DatasetError: There are fewer than two labels, or others than `like` has, two begin with the same token, or a
            prompt is too long.
    """
    rows = read_rows(dataset).to_pydict()
    asked: list[list[int]] = []
    first = {} if like is None else dict(zip(like.words, like.tokens, strict=True))
    for number, (document, word) in enumerate(zip(documents(rows, tokenizer), rows["completion"], strict=True), 1):
        where = f"{dataset.uri} row {number}"
        prompt = [token for token, learnt in zip(document.ids, document.answer, strict=True) if not learnt]
        if room is not None and len(prompt) > room:
            what = f"asks with {len(prompt)} tokens, expected at most {room} beside the soft prompt"
            raise DatasetError(where, what, "Shorten it, or lower the method's length.")
        if like is not None and word not in first:
            what = f"has the label {word!r}, expected one of {', '.join(map(repr, like.words))}"
            raise DatasetError(where, what, "Use the labels of the data that the prompt is searched with.")
        begins = document.ids[len(prompt)]
        if first.setdefault(word, begins) != begins:
            what = f"its label {word!r} begins with another token than in rows before"
            raise DatasetError(where, f"{what}, expected the same in all", "Let prompts end with a whole word.")
        asked.append(prompt or [tokenizer.eos_token_id])
    words = tuple(sorted(first))
    if len(words) < 2 or len(set(first.values())) < len(words):
        what = (
            f"has the labels {', '.join(map(repr, words))}, expected at least two that begin with tokens of their own"
        )
        raise DatasetError(dataset.uri, what, "Choose other words for the labels.")
    labels = torch.tensor([words.index(word) for word in rows["completion"]])
    return Choices(asked, labels, words, tuple(first[w] for w in words))


class Reader:
    """A model that reads rows behind soft prompts; what an `Oracle` asks."""

    def __init__(self, model: Any, padding: int, *, batch_size: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.padding, self.batch_size = padding, batch_size
        self.prompt: SoftPrompt | None = None

    def probabilities(
        self, candidates: Float[Tensor, "candidates length width"], rows: Choices
    ) -> Float[Tensor, "candidates rows choices"]:
        """Of each label's word among all words, behind each prompt."""
        return torch.stack([self._of(candidate, rows) for candidate in candidates])

    def _of(self, candidate: Float[Tensor, "length width"], rows: Choices) -> Float[Tensor, "rows choices"]:
        device = next(self.model.parameters()).device
        if self.prompt is None:
            self.prompt = put_before(self.model, candidate.to(device))
        self.prompt.embeddings = candidate.to(device)
        parts = []
        for start in range(0, len(rows.prompts), self.batch_size):
            ids, mask = self._padded(rows.prompts[start : start + self.batch_size], device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            trunk, head = trunk_of(self.model), head_of(self.model)
            out = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            logits = head.shaped(head.linear(out.last_hidden_state[:, -1])).float()
            parts.append(logits.softmax(dim=-1)[:, list(rows.tokens)].cpu())
        return torch.cat(parts)

    def _padded(self, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and what of them is text, as they end at the same place."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.padding] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        return ids, mask
