"""The contract every memory keeps: facts beside a model, which it consults while it answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lfm.editing.base import Fact
from lfm.errors import LfmError
from lfm.hooks import Blocks
from lfm.method import Method, Needs


class OtherMemory(LfmError, ValueError):
    """An earlier memory that cannot be added to, or not be put beside this model."""

    def __init__(self, where: str, what: str, allowed: str, fix: str) -> None:
        super().__init__(where, what, allowed, fix)
        self.where, self.what, self.allowed, self.fix = where, what, allowed, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, expected {self.allowed}. {self.fix}"


@dataclass(frozen=True, slots=True)
class State:
    """What has been remembered so far.

    Attributes:
        tensors: By name, on the CPU.
        notes: All the rest, as JSON has it.
    """

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


class Remember(Method, ABC):
    """Keeps facts beside a model.

    Whoever calls it has put the model into evaluation mode, and calls it as transformers' causal language models are:
    `model(input_ids=, attention_mask=).logits`. Nothing of the model is different after `remember`.
    """

    __slots__ = ()
    needs = Needs(access="gradients", data="labelled", architecture="decoder")

    def check(self, num_layers: int) -> None:
        """Refuse a model of a number of layers that its fields do not fit, before anything is read.

        Raises:
            HyperparameterError: A field names a layer that there is not.
        """
        return

    @abstractmethod
    def remember(
        self, state: State | None, model: nn.Module, blocks: Blocks, facts: Sequence[Fact], *, seed: int
    ) -> State:
        """What is remembered when the facts have been added, one after the other.

        So it is the same whether they come at once or in several calls.

        Args:
            state: What was remembered before, which stays as it is; None where that is nothing.
            model: Who shall say them, in float32; its memory, if it has one attached, is taken off.
            blocks: Its layers.
            facts: What it shall say.
            seed: Of the draws.

        Raises:
            OtherMemory: `state` is of another shape than what this would add to it.
        """

    @abstractmethod
    def attach(self, model: nn.Module, blocks: Blocks, state: State) -> RemovableHandle:
        """Have a model consult what is remembered, from now on, until the handle is removed or its ``with`` ends.

        Every token is looked at by itself, so that the answer is the same alone and in a batch, padded or not, and
        with a cache of keys and values or without.
        """
