"""Contract of tuning: which weights of a model learn, or what is added to it that learns."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from lfm.method import Method, Needs


class Inject(Protocol):
    """Adds a parameter-efficient part to a model in place; the operator lets PEFT do it."""

    def __call__(self, kind: str, **fields: Any) -> None:
        """Add what PEFT calls `kind` (``LORA``), with its fields; only what was added requires a gradient then."""


class Tune(Method, ABC):
    """Says what learns; the loss is the operator's, the same for all: cross entropy on answer tokens.

    What is added is either PEFT's, through `Inject`, or this project's own: then the method is a `Rewrite` too.

    Attributes:
        gives: ``model`` where the result is a whole model, ``adapter`` where it is a folder beside its base.
        starts_unchanged: Whether the model says the same after attaching as before.
    """

    gives: ClassVar[Literal["model", "adapter"]]
    starts_unchanged: ClassVar[bool] = True
    needs = Needs(access="gradients", data="labelled")
    __slots__ = ()

    @abstractmethod
    def attach(self, model: nn.Module, inject: Inject) -> None:
        """Make exactly those parameters require a gradient that learn, after adding them where they are new."""

    def export(self, model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept of what was trained, by its names in a model that was rewritten.

        Args:
            model: The one that was trained; the values are those of `trained`, not its own.
            trained: Every parameter that learnt, by its name in `model`.
        """
        return dict(trained)
