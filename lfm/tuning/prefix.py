"""Prefix tuning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lfm.method import Needs
from lfm.rewriting import Rewrite
from lfm.tuning.base import Inject, Tune
from lfm.virtual_tokens import NAME, Plain, Reparametrized, Virtual, put_in, what_it_keeps


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix(Tune, Rewrite):
    """Learn what a few virtual tokens before every text leave in the cache of a frozen decoder: keys and values.

    Layer `l` of the model gets `keys[l]` and `values[l]` of shape (heads, length, width of a head):

    1. Start. With `hidden`, `table` has a random row for each virtual token, of which an MLP makes keys and values.
    2. Read. Each token attends to the virtual tokens and to the tokens before it.
    3. Train. Only `table` and the MLP learn, or without `hidden` the keys and values themselves.
    4. Drop. What the MLP makes in the end is kept, the MLP is not.

    The result computes `softmax(query @ [keys[l]; K].T * scale) @ [values[l]; V]` in each head; K and V are the text's.

    Attributes:
        length: How many virtual tokens there are, at least 1. The paper's length of the prefix, |P_idx|.
        hidden: Inner width of the MLP that makes them (the paper's P) of `table` (its P'), at least 1; none trains
            the keys and values themselves, from near 0, which the paper finds less stable.

    Differs from the paper:
        The text's tokens keep their positions, from 0, where the paper's code counts on after the prefix: nothing of a
        model's context is lost, and rotary models differ by what is learnt only. The prefix is seen from everywhere,
        also past the window of a layer with a sliding one. It starts at random, not as the activations of words.

    Example:
        >>> Prefix(length=10).hidden
        512

    Reference:
        Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021.
        https://arxiv.org/abs/2101.00190
    """

    reference, area, leaf = "arXiv:2101.00190", "tuning", "A2a"
    gives = "adapter"
    starts_unchanged = False
    needs = Needs(access="gradients", data="labelled", architecture="decoder", cache=True)

    length: int = 10
    hidden: int | None = 512

    def __post_init__(self) -> None:
        self.require(self.length >= 1, "length", "length >= 1")
        self.require(self.hidden is None or self.hidden >= 1, "hidden", "hidden >= 1, or none")

    @override
    def attach(self, model: nn.Module, inject: Inject) -> None:
        decoder = _decoder(model)
        kept = what_it_keeps(decoder)
        virtual: Virtual = Plain(kept.shapes, self.length)
        if self.hidden is not None:
            d = decoder.get_input_embeddings().embedding_dim
            virtual = Reparametrized(kept.shapes, self.length, d=d, width=self.hidden)
        put_in(decoder, virtual, kept.empty).requires_grad_(True)

    @override
    def rewrite(self, model: nn.Module) -> None:
        decoder = _decoder(model)
        kept = what_it_keeps(decoder)
        put_in(decoder, Plain(kept.shapes, self.length), kept.empty)

    @override
    def export(self, model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.hidden is None:
            return dict(trained)
        virtual = _decoder(model).get_submodule(f"{NAME}.virtual")
        home = next(n for n, m in model.named_modules() if m is virtual)
        named = {n.removeprefix(f"{home}."): t for n, t in trained.items()}
        with torch.device("meta"):  # the one in the model may be taken apart
            again = Reparametrized(virtual.shapes, self.length, d=named["table"].shape[1], width=self.hidden)
        kept: dict[str, Tensor] = {}
        for layer, (keys, values) in enumerate(functional_call(again, named, ())):
            kept |= {f"{home}.keys.{layer}": keys, f"{home}.values.{layer}": values}
        return kept


def _decoder(model: Any) -> Any:
    """The part of a language model that reads, without its head."""
    return model.get_decoder()
