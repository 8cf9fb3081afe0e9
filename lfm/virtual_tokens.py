"""Keys and values that a decoder finds in its cache, as if tokens before the text had left them there."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from typing_extensions import override

from lfm.hooks import NoBlocks, cache_name

NAME = "prefix"
WINDOWED = "sliding_attention"

Shapes = tuple[tuple[tuple[int, int], tuple[int, int]], ...]
"""Of each layer that has them: heads and width of its keys, and of its values."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a decoder keeps of the tokens that it has read.

    Attributes:
        shapes: Of its keys and values.
        empty: Makes a cache in which nothing is.
    """

    shapes: Shapes
    empty: Callable[[], Any]


class Virtual(nn.Module, ABC):
    """The keys and values of `length` virtual tokens, for each layer."""

    def __init__(self, shapes: Shapes, length: int) -> None:
        super().__init__()
        self.shapes, self.length = shapes, length

    @abstractmethod
    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """The keys and the values of each layer, both of shape (heads, length, width)."""


class Plain(Virtual):
    """They are parameters themselves, drawn near 0."""

    def __init__(self, shapes: Shapes, length: int) -> None:
        super().__init__(shapes, length)
        drawn = [[0.02 * torch.randn(heads, length, width) for heads, width in pair] for pair in shapes]
        self.keys = nn.ParameterList(keys for keys, _ in drawn)
        self.values = nn.ParameterList(values for _, values in drawn)

    @override
    def forward(self) -> list[tuple[Tensor, Tensor]]:
        # Not the parameters themselves: whoever takes them apart after this call takes no copy with them.
        return [(k.clone(), v.clone()) for k, v in zip(self.keys, self.values, strict=True)]


class Reparametrized(Virtual):
    """An MLP makes them of a smaller table, with a row for each virtual token.

    Args:
        shapes: See `Shapes`.
        length: How many virtual tokens there are.
        d: Width of the table.
        width: Inner width of the MLP.
    """

    def __init__(self, shapes: Shapes, length: int, *, d: int, width: int) -> None:
        super().__init__(shapes, length)
        self.table = nn.Parameter(torch.randn(length, d))
        numbers = sum(heads * size for pair in shapes for heads, size in pair)
        self.mlp = nn.Sequential(nn.Linear(d, width), nn.Tanh(), nn.Linear(width, numbers))

    @override
    def forward(self) -> list[tuple[Tensor, Tensor]]:
        sizes = [heads * size for pair in self.shapes for heads, size in pair]
        parts = iter(self.mlp(self.table).split(sizes, dim=-1))
        return [
            (_in_heads(next(parts), keys_heads), _in_heads(next(parts), values_heads))
            for (keys_heads, _), (values_heads, _) in self.shapes
        ]


def _in_heads(flat: Tensor, heads: int) -> Tensor:
    return flat.reshape(len(flat), heads, -1).transpose(0, 1)


class PrefixedCache(nn.Module):
    """A part of a decoder that fills every new cache with virtual tokens before the decoder reads anything.

    The text's own tokens have the positions that they have without it, from 0, and all of them see all virtual tokens,
    also where a layer's attention reaches no further than a window of tokens, and where a row is padded on its left.

    Args:
        virtual: What the cache is filled with.
        empty: Makes a cache, where a caller brings none.
        config: The decoder's.

    Raises:
        NoBlocks: A layer attends to something else than all tokens before it, or those within a window.
    """

    def __init__(self, virtual: Virtual, empty: Callable[[], Any], config: Any) -> None:
        super().__init__()
        self.virtual, self.empty = virtual, empty
        window: int | None = getattr(config, "sliding_window", None)
        kinds: list[str] = getattr(config, "layer_types", None) or [WINDOWED if window else "full_attention"]
        strange = set(kinds) - {WINDOWED, "full_attention"}
        if strange:
            what = f"it has layers of {min(strange)!r}"
            raise NoBlocks(str(config.model_type), what, "only full attention and that within a window")
        self.windows = {kind: window if kind == WINDOWED else None for kind in kinds}

    def filled(self, cache: Any, rows: int, dtype: torch.dtype) -> Any:
        """A cache in which nothing was, with the virtual tokens in it; it forgets no token that a window leaves."""
        whole = self.empty()
        for layer, pair in enumerate(self.virtual()):
            keys, values = (part.to(dtype).expand(rows, -1, -1, -1) for part in pair)
            whole.update(keys, values, layer)
        cache.layers = whole.layers
        return cache

    def masks(self, there: Bool[Tensor, "rows seen"], tokens: int, dtype: torch.dtype) -> Tensor | Mapping[str, Tensor]:
        """What the last `tokens` of a text see, as a decoder takes it: what to add, by kind of layer where it has two.

        Args:
            there: Which of all tokens of the text, those in the cache first, are no padding.
            tokens: How many of them the decoder is about to read.
            dtype: Of the numbers.
        """
        masks = {kind: self._mask(there, tokens, window, dtype) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, there: Bool[Tensor, "rows seen"], tokens: int, window: int | None, dtype: torch.dtype) -> Tensor:
        rows, seen = there.shape
        key = torch.arange(seen, device=there.device)
        query = key[-tokens:, None]
        near = key <= query if window is None else (key <= query) & (key > query - window)
        virtual = there.new_ones(rows, tokens, self.virtual.length)
        visible = torch.cat([virtual, near & there[:, None, :]], dim=-1)[:, None]
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def what_it_keeps(decoder: Any) -> Kept:
    """How wide the keys and values of each layer are, and what makes a cache: seen from a token that is read.

    Raises:
        NoBlocks: It keeps none, or is not told the positions of its tokens.
    """
    name, network = cache_name(decoder), type(decoder).__name__
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise NoBlocks(network, "it is not told the positions of its tokens", "a decoder that takes position_ids")
    device = next(decoder.parameters()).device
    training = decoder.training
    with torch.no_grad():
        out = decoder.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True)
    decoder.train(training)
    cache = getattr(out, name, None)
    if cache is None:
        raise NoBlocks(network, "it keeps no keys and values of what it has read", "a decoder")
    pairs = [(one.keys.shape, one.values.shape) for one in cache.layers]
    return Kept(tuple(((k[1], k[3]), (v[1], v[3])) for k, v in pairs), type(cache))


def put_in(decoder: Any, virtual: Virtual, empty: Callable[[], Any]) -> PrefixedCache:
    """Have a decoder find virtual tokens in every cache that it begins, whoever calls it."""
    prefix = PrefixedCache(virtual, empty, decoder.config)
    decoder.add_module(NAME, prefix)
    decoder.register_forward_pre_hook(_before, with_kwargs=True)
    return prefix


def _before(
    decoder: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a decoder is called with: a hook that holds nothing, so that a copy finds its own prefix."""
    prefix, name = decoder.get_submodule(NAME), cache_name(decoder)
    assert isinstance(prefix, PrefixedCache)
    given: Tensor = (
        arguments[0]
        if arguments
        else next(named[k] for k in ("input_ids", "inputs_embeds") if named.get(k) is not None)
    )
    rows, tokens = given.shape[:2]
    dtype: torch.dtype = decoder.get_input_embeddings().weight.dtype
    cache = named.get(name)
    if cache is None:
        cache = prefix.empty()
    if not cache.get_seq_length():
        cache = prefix.filled(cache, rows, dtype)
    read = cache.get_seq_length() - prefix.virtual.length
    there = named.get("attention_mask")
    there = given.new_ones(rows, read + tokens, dtype=torch.bool) if there is None else there.bool()
    places = named.get("position_ids")
    return arguments, {
        **named,
        name: cache,
        "use_cache": True,
        "attention_mask": prefix.masks(there, tokens, dtype),
        "position_ids": positions(there)[:, -tokens:] if places is None else places,
    }


def positions(there: Bool[Tensor, "rows seen"]) -> Int[Tensor, "rows seen"]:
    """Each token's place in its text, counted from 0 after the padding on its left."""
    return (there.long().cumsum(-1) - 1).clamp(min=0)
