"""Contract of tuning: which weights of a model learn, or what is added to it that learns."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Protocol

from torch import nn

from lfm.method import Method, Needs


class Inject(Protocol):
    """Adds a parameter-efficient part to a model in place; the operator lets PEFT do it."""

    def __call__(self, kind: str, **fields: Any) -> None:
        """Add what PEFT calls `kind` (``LORA``), with its fields; only what was added requires a gradient then."""


class Tune(Method, ABC):
    """Says what learns; the loss is the operator's, the same for all: cross entropy on answer tokens.

    Attributes:
        gives: ``model`` where the result is a whole model, ``adapter`` where it is a PEFT folder beside its base.
    """

    gives: ClassVar[Literal["model", "adapter"]]
    needs = Needs(access="gradients", data="labelled")
    __slots__ = ()

    @abstractmethod
    def attach(self, model: nn.Module, inject: Inject) -> None:
        """Make exactly those parameters require a gradient that learn, after adding them where they are new."""
