"""Rows of text -> tokens -> packed rows -> micro-batches; the same for every number of workers."""

import bisect
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lfm.errors import LfmError

IGNORED = -100  # a target that is no loss token, as torch's cross entropy has it


class NoLossToken(LfmError, ValueError):
    """Data without a token to learn from."""

    def __init__(self, where: str, rows: int) -> None:
        super().__init__(where, rows)
        self.where, self.rows = where, rows

    def __str__(self) -> str:
        return (
            f"{self.where}: none of {self.rows} rows has an answer token, expected at least one. "
            "Look at the data's answers, and at whether prompts alone fill the row (length)."
        )


class ChatFormatError(LfmError, ValueError):
    """A conversation that the tokenizer's chat template cannot say."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)
        self.what, self.fix = what, fix

    def __str__(self) -> str:
        return f"chat template: {self.what}, expected one that renders every turn. {self.fix}"


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and which of them are to be learnt."""

    ids: Sequence[int]
    answer: Sequence[bool]


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed rows, as arrays of shape (rows, length).

    Attributes:
        ids: Tokens.
        positions: Each token's place in its document; a new document starts at 0.
        targets: The token that follows within the document where it is to be learnt, else `IGNORED`. A classifier's
            row has one, its label, at the last token of its text.
        cut: Documents that were longer than a row, and so became several.
        left_out: Documents that have nothing to learn.
    """

    ids: "np.ndarray[Any, np.dtype[np.int32]]"
    positions: "np.ndarray[Any, np.dtype[np.int32]]"
    targets: "np.ndarray[Any, np.dtype[np.int32]]"
    cut: int = 0
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_tokens(self) -> int:
        """How many tokens are learnt."""
        return int((self.targets != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows on a device."""

    ids: Int[Tensor, "rows length"]
    positions: Int[Tensor, "rows length"]
    targets: Int[Tensor, "rows length"]
    where: "np.ndarray[Any, np.dtype[np.int64]]"  # which of `rows` these are
    rows: Rows

    @property
    def loss_tokens(self) -> int:
        """How many tokens are learnt."""
        return int((self.targets != IGNORED).sum())


def documents(columns: Mapping[str, Sequence[Any]], tokenizer: Any) -> Iterator[Document]:
    """Tokenize rows of text, of prompt and completion, or of messages; each ends with the end-of-text token.

    Of text every token is learnt, of the others the answers only. Prompt and completion become a conversation where
    the tokenizer has a chat template, and are joined as they are where it has none. What begins a text begins each,
    but for a conversation, whose template says how it begins.
    """
    first = opening(tokenizer)
    if "text" in columns:
        for ids in tokenizer(list(columns["text"]), add_special_tokens=False, verbose=False)["input_ids"]:
            whole = [*first, *ids, tokenizer.eos_token_id]
            yield Document(whole, [False] * len(first) + [True] * (len(whole) - len(first)))
    elif "messages" in columns:
        for messages in columns["messages"]:
            yield conversation(messages, tokenizer)
    else:
        for prompt, completion in zip(columns["prompt"], columns["completion"], strict=True):
            yield _pair(prompt, completion, tokenizer, first)


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, such as Llama's and Gemma's beginning-of-sequence token; often nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return list(whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)])


def _pair(prompt: Any, completion: Any, tokenizer: Any, first: Sequence[int]) -> Document:
    if tokenizer.chat_template is None and isinstance(prompt, str) and isinstance(completion, str):
        asked = [*first, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        said = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return Document([*asked, *said], [False] * len(asked) + [True] * len(said))
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    return conversation([*asked, *said], tokenizer, learnt_from=len(asked))


def conversation(messages: Sequence[Mapping[str, str]], tokenizer: Any, *, learnt_from: int = 0) -> Document:
    """Tokenize a conversation; what the assistant says, with what ends its turn, is learnt.

    An answer's span is what the template adds to its prompt (``add_generation_prompt``) when the turn is there. The
    whole is tokenized at once; where a token would reach over the edge of a span, in parts that end there, as the
    prompt alone does when the model is asked.

    Raises:
        ChatFormatError: The tokenizer has no template, or it changes earlier turns when one is added.
    """
    if tokenizer.chat_template is None:
        raise ChatFormatError("the tokenizer has none", "Use an instruction-tuned model's, or prompt and completion.")
    if not tokenizer.is_fast:
        raise ChatFormatError("the tokenizer does not say where in the text a token is", "Convert it to a fast one.")
    text = ""
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:turn], tokenizer, prompt=True)
        after = _rendered(messages[: turn + 1], tokenizer, prompt=False)
        if not after.startswith(before) or not before.startswith(text):
            raise ChatFormatError("it rewrites earlier turns when one is added", "Split the data into single answers.")
        if turn >= learnt_from:
            spans.append((len(before), len(after)))
        text = after
    return _spanned(text, spans, tokenizer)


def _spanned(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any) -> Document:
    """Tokenize a text of which `spans`, in order, are learnt."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = found["offset_mapping"]
    edges = sorted({edge for span in spans for edge in span})
    if not any(begin < edge < end for begin, end in places for edge in edges):
        # Some tokenizers leave spaces out of a token's place: one that is all space begins where it ends.
        return Document(
            found["input_ids"], [any(a <= begin and a < end <= b for a, b in spans) for begin, end in places]
        )
    ids: list[int] = []
    learnt = []
    for begin, end in itertools.pairwise([0, *edges, len(text)]):
        part = tokenizer(text[begin:end], add_special_tokens=False, verbose=False)["input_ids"]
        ids += part
        learnt += [(begin, end) in spans] * len(part)
    return Document(ids, learnt)


def _rendered(messages: Sequence[Mapping[str, str]], tokenizer: Any, *, prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def packed(found: Iterator[Document], *, length: int, padding: int, packing: bool, where: str) -> Rows:
    """Fill rows of `length` tokens with documents; what is longer is cut into pieces that each stand alone.

    With `packing` a document goes into the fullest row that has room for it, longest first; without, each piece has
    a row of its own.

    Raises:
        NoLossToken: There is nothing to learn in all of it.
    """
    pieces: list[Document] = []
    cut = left_out = 0
    for document in found:
        parts = list(_pieces(document, length))
        pieces += parts
        cut += len(document.ids) > length
        left_out += not parts
    if packing:
        pieces.sort(key=lambda p: -len(p.ids))  # stable: equal lengths stay in the data's order
    bins: list[list[Document]] = []
    room: list[tuple[int, int]] = []  # (tokens free, bin), sorted
    for piece in pieces:
        at = bisect.bisect_left(room, (len(piece.ids), -1)) if packing else len(room)
        if at < len(room):
            free, number = room.pop(at)
            bins[number].append(piece)
        else:
            free, number = length, len(bins)
            bins.append([piece])
        bisect.insort(room, (free - len(piece.ids), number))
    shape = (len(bins), length)
    ids, positions, targets = (np.full(shape, value, np.int32) for value in (padding, 0, IGNORED))
    rows = Rows(ids, positions, targets, cut, left_out)
    for i, held in enumerate(bins):
        at = 0
        for piece in held:
            n = len(piece.ids)
            rows.ids[i, at : at + n] = piece.ids
            rows.positions[i, at : at + n] = np.arange(n)
            following = np.asarray(piece.ids[1:], np.int32)
            rows.targets[i, at : at + n - 1] = np.where(np.asarray(piece.answer[1:], bool), following, IGNORED)
            at += n
        rows.positions[i, at:] = np.arange(length - at)  # padding is one more document, of which nothing is learnt
    if not rows.loss_tokens:
        raise NoLossToken(where, len(rows))
    return rows


def _pieces(document: Document, length: int) -> Iterator[Document]:
    """A document in pieces that fit; one without anything to learn is left out, and so is what only its start shows."""
    for start in range(0, len(document.ids), length):
        piece = Document(document.ids[start : start + length], document.answer[start : start + length])
        if any(piece.answer[1:]):
            yield piece


@functools.lru_cache(maxsize=2)  # a batch may need the end of one epoch and the start of the next
def order(rows: int, epoch: int, seed: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """The rows' order in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def global_batch(rows: int, step: int, batch_size: int, seed: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Which rows step `step` takes: the next ones of one epoch after another."""
    first = step * batch_size
    parts = []
    for epoch in range(first // rows, (first + batch_size - 1) // rows + 1):
        taken = order(rows, epoch, seed)
        begin, end = first - epoch * rows, first + batch_size - epoch * rows
        parts.append(taken[max(0, begin) : min(rows, end)])
    return np.concatenate(parts)


def share(batch: "np.ndarray[Any, np.dtype[np.int64]]", rank: int, world: int, micro: int | None) -> "list[Any]":
    """The micro-batches of one worker; every worker gets as many, some of them smaller or empty."""
    largest = -(-len(batch) // world)
    size = min(micro or largest, largest)
    mine = np.array_split(batch, world)[rank]
    return [mine[i : i + size] for i in range(0, -(-largest // size) * size, size)]


def on_device(rows: Rows, where: "np.ndarray[Any, np.dtype[np.int64]]", device: torch.device) -> Batch:
    """Some rows as tensors; what is padding in all of them is cut off.

    No rows at all become one without a loss token, so that a worker without work still takes part.
    """
    targets = rows.targets[where] if len(where) else np.full((1, rows.ids.shape[1]), IGNORED, np.int32)
    where = where if len(where) else np.zeros(1, np.int64)
    used = np.flatnonzero((targets != IGNORED).any(axis=0))
    width = int(used[-1]) + 1 if len(used) else 1

    def moved(values: "np.ndarray[Any, np.dtype[np.int32]]") -> Tensor:
        return torch.from_numpy(values[:, :width].astype(np.int64)).to(device)

    return Batch(moved(rows.ids[where]), moved(rows.positions[where]), moved(targets), where, rows)
