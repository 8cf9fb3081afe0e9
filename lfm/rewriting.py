"""Contract of a method that puts modules of this project into a network."""

from abc import ABC, abstractmethod

from torch import nn


class Rewrite(ABC):
    """Beside its family: says what it puts in, so that the same can be put in again where the result is loaded.

    Its fields and the network decide all of it but the values, which come from the result's tensors by their names.
    """

    __slots__ = ()

    @abstractmethod
    def rewrite(self, model: nn.Module) -> None:
        """Put the modules into a network, in place; what was there before keeps its names.

        Raises:
            NoBlocks: The network has no place for them.
        """
