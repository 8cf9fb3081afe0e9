"""Our own engine: a plain decode loop with a key-value cache, for any decoder of transformers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lfm.errors import LfmError
from lfm.hooks import cache_name
from operators.language_models import head_of, trunk_of
from operators.objectives import plain
from operators.soft_prompts import length_of


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


class Native:
    """One model in this process.

    Attributes:
        ends: The tokens that end a text.
        start: What a text without a token begins with: nothing comes of nothing.
        context: How many tokens the model is made for, None where it does not say.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = plain(model).eval()
        self.tokenizer = tokenizer
        self.head = head_of(self.model)
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
        import transformers

        trunk = trunk_of(self.model)
        cache = {cache_name(trunk): transformers.DynamicCache(config=self.model.config)}
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
            out = trunk(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, **cache)
            logits = self.head.shaped(self.head.linear(out.last_hidden_state[:, -1])).float()
            ids = choose(logits, sampling, draws)[:, None]
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
        """What the model says after each token of a text, in float32."""
        device = next(self.model.parameters()).device
        return self.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu()  # type: ignore[no-any-return]


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
