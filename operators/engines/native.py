"""Our own engine: a plain decode loop with a key-value cache, for any decoder of transformers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lfm.errors import LfmError
from lfm.hooks import Blocks, cache_name, inputs_of
from lfm.retrieval.base import Retrieve, Search
from operators.data.batches import IGNORED, Batch
from operators.models.ensembles import new_cache
from operators.models.language_models import heads_of, trunk_of
from operators.models.objectives import plain
from operators.models.soft_prompts import length_of


class SamplingError(LfmError, ValueError):
    """A wish for tokens that cannot be granted."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.field, self.value, self.allowed = field, value, allowed

    def __str__(self) -> str:
        return f"{self.field}={self.value!r}, expected {self.allowed}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_tokens: The most that are generated for each prompt, at least 1.
        temperature: 0 takes the likeliest token; above, logits are divided by it first.
        top_p: Only the likeliest tokens that together have this probability are drawn from, in (0, 1].
        seed: Of the draws.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for holds, field, allowed in (
            (self.max_tokens >= 1, "max_tokens", "max_tokens >= 1"),
            (0 <= self.temperature <= 2, "temperature", "0 <= temperature <= 2"),
            (0 < self.top_p <= 1, "top_p", "0 < top_p <= 1"),
        ):
            if not holds:
                raise SamplingError(field, getattr(self, field), allowed)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model makes of tokens, before its head.

    Attributes:
        hidden: What goes into the head, of shape (..., width).
        queries: What a datastore is asked with at the same tokens; the same tensor where there is none.
    """

    hidden: Float[Tensor, "*tokens width"]
    queries: Float[Tensor, "*tokens keys"]

    def __getitem__(self, chosen: Any) -> "Reading":
        return Reading(self.hidden[chosen], self.queries[chosen])


class Native:
    """One model in this process, perhaps with a datastore beside it.

    Attributes:
        ends: The tokens that end a text.
        start: What a text without a token begins with: nothing comes of nothing.
        context: How many tokens the model is made for, None where it does not say.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, retrieve: Retrieve | None = None, search: Search | None = None
    ) -> None:
        """Put the model into evaluation mode.

        Args:
            model: Perhaps with what PEFT puts around it.
            tokenizer: Its own.
            retrieve: How what it says is mixed with what `search` finds.
            search: Looks into a datastore; without one `retrieve` only says what its keys are.
        """
        self.model = plain(model).eval()
        self.retrieve, self.search = retrieve, search
        watched = None if retrieve is None else retrieve.watched(Blocks(self.model))
        self.watched = () if watched is None else (watched,)
        self.tokenizer = tokenizer
        self.head = heads_of(self.model)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {int(e) for e in (*ends, tokenizer.eos_token_id) if e is not None}
        self.start = int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
        made_for = int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 0)
        self.context = made_for - length_of(self.model) if made_for else None

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int | None]]:
        """Generate for several prompts at once; each step gives one token for each, None where it has ended.

        A text ends with a token of `ends`, which is not given, or where it fills the context.

        Raises:
            SamplingError: A prompt has no token, or leaves no room for an answer.
        """
        cache = {cache_name(trunk_of(self.model)): new_cache(self.model)}
        lengths = [len(p) for p in prompts]
        if not all(n > 0 and (self.context is None or n < self.context) for n in lengths):
            room = "" if self.context is None else f" and fewer than the model's context of {self.context}"
            raise SamplingError("tokens of the prompt", lengths, f"at least 1{room}")
        device = next(self.model.parameters()).device
        longest = max(lengths)
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
        ids, mask = ids.to(device), mask.to(device)
        draws = torch.Generator(device).manual_seed(sampling.seed)
        going = [True] * len(prompts)
        for given in range(sampling.max_tokens):
            going = [
                g and (self.context is None or n + given < self.context) for g, n in zip(going, lengths, strict=True)
            ]
            if not any(going):
                return
            # A text that has ended goes on unseen beside the others, on the last place that there is.
            places = (mask.cumsum(-1) - 1).clamp(min=0, max=self.context and self.context - 1)[:, -ids.shape[1] :]
            read = self.read(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, **cache)
            ids = choose(self.told(read[:, -1]), sampling, draws)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            tokens = ids[:, 0].tolist()
            going = [g and t not in self.ends for g, t in zip(going, tokens, strict=True)]
            if not any(going):
                return
            yield [t if g else None for t, g in zip(tokens, going, strict=True)]

    def complete(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """All tokens generated for each prompt."""
        said: list[list[int]] = [[] for _ in prompts]
        for tokens in self.decode(prompts, sampling):
            for text, token in zip(said, tokens, strict=True):
                if token is not None:
                    text.append(token)
        return said

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Float[Tensor, "tokens vocab"]:
        """What is told after each token of a text, in float32; log-probabilities of several models or a datastore."""
        device = next(self.model.parameters()).device
        read = self.read(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
        return self.told(read[0]).cpu()

    def read(self, **given: Any) -> Reading:
        """What the model makes of tokens, given as transformers' models take them."""
        with inputs_of(self.model, self.watched) as seen:
            hidden = trunk_of(self.model)(**given).last_hidden_state
        # Some architectures put the rows of a batch one after the other before their MLP.
        queries = [found.reshape(*hidden.shape[:2], -1) for found in seen.values()]
        return Reading(hidden, queries[0] if queries else hidden)

    def answers(self, batch: Batch) -> tuple[Reading, Int[Tensor, "tokens"]]:
        """What is read where a loss token of rows of one document each is told, and those tokens."""
        read, learnt = self.read(input_ids=batch.ids, use_cache=False), batch.targets != IGNORED
        return read[learnt], batch.targets[learnt]

    def told(self, read: Reading) -> Float[Tensor, "tokens vocab"]:
        """Logits in float32, or the log-probabilities that several models' or a datastore's method makes of them."""
        logits = self.head.logits(read.hidden)
        if self.retrieve is None or self.search is None:
            return logits
        return self.retrieve.combine(logits, self.search.nearest(read.queries, self.retrieve.k))

    def losses(self, read: Reading, targets: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Minus the log-probability of each token, in nats, without a distribution of what a datastore has."""
        logits = self.head.logits(read.hidden)
        own = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        if self.retrieve is None or self.search is None:
            return own
        return -self.retrieve.told(-own, targets, self.search.nearest(read.queries, self.retrieve.k))


def choose(logits: Float[Tensor, "rows vocab"], sampling: Sampling, draws: torch.Generator) -> Int[Tensor, "rows"]:
    """The next token of each row."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # Counted from the largest logit none is positive: however small the temperature, it stays the likeliest.
    temperature = max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    shares = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, places = shares.sort(dim=-1, descending=True)
        reached = ordered.cumsum(dim=-1)[:, :-1] >= sampling.top_p
        ordered[:, 1:].masked_fill_(reached, 0.0)  # the first token always stays
        shares = torch.zeros_like(shares).scatter(-1, places, ordered)
    return torch.multinomial(shares, 1, generator=draws)[:, 0]
