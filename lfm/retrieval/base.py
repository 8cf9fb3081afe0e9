"""The contract every retrieval method keeps: a model tells the next token with the help of a datastore."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from lfm.hooks import Blocks
from lfm.method import Method, Needs

Array = np.ndarray[Any, np.dtype[Any]]
"""Perhaps a file that is read as it is needed, and larger than memory."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What was found for some queries, the nearest first.

    Attributes:
        distances: Squared L2, float32, of shape (queries, k); infinite where there was nothing more to find.
        tokens: What followed there, int64 of the same shape.
    """

    distances: Float[Tensor, "queries k"]
    tokens: Int[Tensor, "queries k"]


class Search(Protocol):
    """Finds what is near in one datastore."""

    def nearest(self, queries: Float[Tensor, "queries width"], k: int) -> Neighbours:
        """The `k` nearest entries of each query, or all where there are fewer, on the queries' device."""


class Retrieve(Method, ABC):
    """Tells the next token from what a model says and from what followed where it was in a similar state.

    An entry of the datastore is a key, what entered one module at a token, and a value, the token that followed. A
    query is what enters the same module when the model is asked; so what reads a corpus and what asks is one code.

    Attributes:
        k: How many neighbours it wants of each query.
    """

    __slots__ = ()
    needs = Needs(access="weights", data="unlabelled", architecture="decoder")
    k: int

    def check(self, num_layers: int | None, width: int | None) -> None:
        """Refuse a model of these sizes, each None where it is not known, before anything is read.

        Raises:
            HyperparameterError: A field does not fit them.
            LfmError: It takes a library that is not installed.
        """
        return

    @abstractmethod
    def watched(self, blocks: Blocks) -> str | None:
        """The module whose input is key and query; None for what goes into the model's head.

        Raises:
            HyperparameterError: A field names a layer that there is not.
        """

    @abstractmethod
    def build(self, keys: Array) -> Any:
        """What a search needs besides the keys, of shape (entries, width): an index, or None."""

    @abstractmethod
    def opened(self, keys: Array, values: Array, index: Any) -> Search:
        """What finds neighbours.

        Args:
            keys: Of shape (entries, width), float16 or float32.
            values: Of shape (entries,), int32.
            index: What `build` made of the keys.
        """

    @abstractmethod
    def combine(self, logits: Float[Tensor, "queries vocab"], neighbours: Neighbours) -> Float[Tensor, "queries vocab"]:
        """The log-probability of every token, in float32, from the model's logits and what was found."""

    @abstractmethod
    def told(
        self,
        log_probabilities: Float[Tensor, "queries"],
        targets: Int[Tensor, "queries"],
        neighbours: Neighbours,
    ) -> Float[Tensor, "queries"]:
        """What `combine` gives for one token of each query, from what the model gives for it."""
