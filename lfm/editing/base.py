"""The contract every editing method keeps, and what a fact is to it: token ids and spans, never text."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lfm.deltas import Delta
from lfm.errors import LfmError
from lfm.hooks import Blocks
from lfm.method import Method, Needs

TOKENS = "tokens"
"""What statistics call how many tokens they are of."""


class EditError(LfmError, ValueError):
    """Facts that a method cannot put into a model."""

    def __init__(self, method: str, what: str, allowed: str, fix: str) -> None:
        super().__init__(method, what, allowed, fix)
        self.method, self.what, self.allowed, self.fix = method, what, allowed, fix

    def __str__(self) -> str:
        return f"{self.method}: {self.what}, expected {self.allowed}. {self.fix}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text that asks something about a subject.

    Attributes:
        ids: Its tokens, with what opens a text in this model's vocabulary.
        subject: Where the subject's tokens are in it: the first, and the one after the last.
    """

    ids: Int[Tensor, "tokens"]
    subject: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fact:
    """What a model shall say after a prompt.

    Attributes:
        prompts: The prompt alone, and then the same one after other texts: what it means should not depend on these.
        target: What shall follow, without what ends a text; the same tokens after each of the prompts.
        essence: A prompt that asks what the subject is, which shall not change.
    """

    prompts: Sequence[Prompt]
    target: Int[Tensor, "answer"]
    essence: Prompt


@dataclass(frozen=True, slots=True)
class Lesson:
    """What an editor learns from: a fact that it is told, and what has to hold of the model after its edit.

    Attributes:
        fact: What the model shall say.
        asked: The tokens of a prompt with the same answer, with what opens a text: often a paraphrase of the fact's.
        answer: What shall follow `asked`; the fact's target, as that prompt's text has it.
        others: Texts about something else, padded on the right.
        kept: The places in `others` after which the model shall go on as before.
    """

    fact: Fact
    asked: Int[Tensor, "tokens"]
    answer: Int[Tensor, "answer"]
    others: Int[Tensor, "texts length"]
    kept: Bool[Tensor, "texts length"]


class Edit(Method, ABC):
    """Turns facts into a change of weights.

    Whoever calls it has put the model into evaluation mode, in float32, and calls it as transformers' causal language
    models are: `model(input_ids=, attention_mask=).logits`. Nothing of the model is different after the call.
    """

    __slots__ = ()
    needs = Needs(access="gradients", data="labelled", architecture="decoder")
    taught: ClassVar[bool] = False
    """Whether it works through an editor that was trained for the model."""

    def check(self, num_layers: int) -> None:
        """Refuse a model of so many layers, before anything of it is read.

        Raises:
            HyperparameterError: It has no such layer.
        """

    def judged(self, blocks: Blocks, statistics: Mapping[str, Tensor]) -> Mapping[str, float]:
        """What is worth knowing of the statistics that it will use, by name; often nothing.

        Raises:
            EditError: They are not good enough.
        """
        return {}

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
            statistics: What was measured of this model, by name: of the kinds in `needs`, and `TOKENS`.
            editor: What was trained to edit this model, where the method has such a thing.

        Returns:
            What is added to each parameter that changes, float32.

        Raises:
            EditError: It cannot be done with these facts, statistics or this editor.
        """


class TrainedEdit(Edit, ABC):
    """Edits with a network, the editor, that was trained to edit one model; that model itself stays as it is.

    The editor's parameters are what is trained. Its buffers are sums over all facts that it has observed, so that those
    of processes that observed different ones are to be added up.
    """

    __slots__ = ()
    needs = Needs(access="gradients", data="labelled", architecture="decoder", strategies=("single", "ddp"))
    taught = True

    @abstractmethod
    def changes(self, blocks: Blocks) -> tuple[str, ...]:
        """The names in the model of the parameters that an edit changes.

        Raises:
            HyperparameterError: The model does not have those that a field asks for.
        """

    @abstractmethod
    def build(self, model: nn.Module, blocks: Blocks) -> nn.Module:
        """An editor that has learnt nothing yet; what is drawn comes from torch's own generator.

        Raises:
            HyperparameterError: As `changes` does.
        """

    def observe(self, editor: nn.Module, model: nn.Module, blocks: Blocks, facts: Sequence[Fact]) -> None:
        """Add to the editor's buffers what it has to know of the facts beforehand; nothing for most."""
        return

    @abstractmethod
    def loss(self, editor: nn.Module, model: nn.Module, blocks: Blocks, lesson: Lesson) -> Float[Tensor, ""]:
        """How far the model, edited with the lesson's fact, is from what the lesson asks.

        Whoever calls it has frozen the model, so that the gradient reaches the editor's parameters alone.
        """
