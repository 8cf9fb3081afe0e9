"""Contract of prompting: a soft prompt is made better, and the model is only ever asked for probabilities."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lfm.method import Method, Needs


class Prompt(Method, ABC):
    """Proposes prompts, is told how good they are, and proposes better ones.

    The operator owns the `Oracle`: it asks it with the candidates, has `score` judge the answers and tells the scores,
    until the budget is spent. What a method remembers in between is its state, which the operator hands on unseen.

    Attributes:
        length: Virtual tokens of a prompt, at least 1.
        budget: How many prompts are tried, at least 1: one question is one prompt before all examples.
    """

    __slots__ = ()
    needs = Needs(access="probabilities", data="labelled", architecture="decoder")
    length: int
    budget: int

    @abstractmethod
    def start(self, initial: Float[Tensor, "length width"], *, spread: float, seed: int) -> Any:
        """The state before anything was asked.

        Args:
            initial: Where the search begins.
            spread: The standard deviation of the numbers in the model's word embeddings.
            seed: Decides all that is drawn.
        """

    @abstractmethod
    def ask(self, state: Any) -> Float[Tensor, "candidates length width"]:
        """The next prompts to try; asked again without being told, it may propose others."""

    @abstractmethod
    def tell(self, state: Any, scores: Float[Tensor, "candidates"]) -> Any:
        """The state after the last candidates got these scores, of which the smaller is the better."""

    @abstractmethod
    def best(self, state: Any) -> Float[Tensor, "length width"]:
        """The prompt with the smallest score of all that were tried."""

    @abstractmethod
    def score(
        self, probabilities: Float[Tensor, "candidates rows choices"], labels: Int[Tensor, "rows"]
    ) -> Float[Tensor, "candidates"]:
        """How bad each candidate is.

        Args:
            probabilities: Of each label's word after each row, among all words.
            labels: Which label is right.
        """
