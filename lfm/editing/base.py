"""The contract every editing method keeps, and what a fact is to it: token ids and spans, never text."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor, nn

from lfm.deltas import Delta
from lfm.hooks import Blocks
from lfm.method import Method, Needs


@dataclass(frozen=True, slots=True)
class Fact:
    """What a model shall say after a prompt.

    Attributes:
        prompt: The text that asks, with what opens a text in this model's vocabulary.
        subject: Where in `prompt` the subject's tokens are: the first, and the one after the last.
        target: What shall follow, without what ends a text.
        contexts: Texts that may stand before the prompt, each with what opens a text; the prompt then follows without
            it. Never empty: the first is what opens a text alone, which gives `prompt` itself.
        essence: A prompt that asks what the subject is, which shall not change; and the subject's place in it.
        essence_subject: The same as `subject`, of `essence`.
    """

    prompt: Int[Tensor, "tokens"]
    subject: tuple[int, int]
    target: Int[Tensor, "answer"]
    contexts: Sequence[Int[Tensor, "before"]]
    essence: Int[Tensor, "asked"]
    essence_subject: tuple[int, int]


class Edit(Method, ABC):
    """Turns facts into a change of weights.

    Whoever calls it has put the model into evaluation mode, in float32, and calls it as transformers' causal language
    models are: `model(input_ids=, attention_mask=).logits`. Nothing of the model is different after the call.
    """

    __slots__ = ()
    needs = Needs(access="gradients", data="labelled", architecture="decoder")

    @abstractmethod
    def solve(
        self,
        model: nn.Module,
        blocks: Blocks,
        facts: Sequence[Fact],
        *,
        statistics: Mapping[str, Tensor],
        editor: nn.Module | None,
    ) -> Delta:
        """The change that makes the model say what the facts do.

        Args:
            model: Who is edited.
            blocks: Its layers.
            facts: What it shall say; where it takes several they are changed together, else one after the other.
            statistics: What was measured of this model, by name: of the kinds in `needs`.
            editor: What was trained to edit this model, where the method has such a thing.

        Returns:
            What is added to each parameter that changes, float32.
        """
