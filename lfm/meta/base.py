"""Contract of meta-learning: from tasks of a few examples a model learns how to learn the next one."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from lfm.method import Method, Needs
from lfm.networks import BATCHNORM, statistics_of

HEAD = "head"
"""What a network calls the linear layer that tells classes, in which what it is given are the features."""

Parameters = Mapping[str, Tensor]
"""Those that are meta-learnt, by their names in the model."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Some examples of one task.

    Attributes:
        inputs: What the model is called with: images, or what else the model of an operator takes.
        targets: What it should say, a class for each row of the logits that it gives.
    """

    inputs: Any
    targets: Int[Tensor, "targets"]


@dataclass(frozen=True, slots=True)
class Episode:
    """One task: what is learnt from, and what is asked then.

    Attributes:
        support: The few examples.
        query: Other examples of the same classes, or texts of the same label.
    """

    support: Examples
    query: Examples


class Meta(Method, ABC):
    """Says how parameters become those of one task, and what these cost on the task's other examples.

    What is learnt from many tasks are the parameters before: the operator follows the gradient of `outer` after
    `adapt`. Nothing of the model changes in either, neither its parameters nor its buffers nor its mode.
    """

    __slots__ = ()
    needs = Needs(access="gradients", data="labelled", strategies=("single", "ddp"))

    def check(self, *, head: bool) -> None:
        """Refuse a kind of model, before anything of it is read.

        Args:
            head: Whether what is learnt has a linear layer called `HEAD`, as networks do; LoRA has none.

        Raises:
            HyperparameterError: A field asks for what such a model does not have.
        """

    @abstractmethod
    def adapt(self, model: nn.Module, parameters: Parameters, support: Examples, *, training: bool) -> Parameters:
        """The parameters for one task.

        Args:
            model: Gives logits for inputs.
            parameters: From where it starts.
            support: What it learns from.
            training: Whether the way back to `parameters` is kept, for the gradient of `outer`. If not, the result is
                free of it, and methods that do more for a test may do so.
        """

    def outer(self, model: nn.Module, parameters: Parameters, query: Examples) -> Float[Tensor, ""]:
        """The sum of the cross entropy over the query's targets, with the parameters that `adapt` gave."""
        return nn.functional.cross_entropy(told(model, parameters, query), query.targets, reduction="sum")


def told(model: nn.Module, parameters: Parameters, examples: Examples) -> Float[Tensor, "targets classes"]:
    """The logits of a model with other parameters, as it tells them within an episode; nothing of it changes.

    Dropout is off. Batch normalisation takes the mean and variance of these very examples, and what it counts along the
    way is forgotten with the copies that it gets for that.
    """
    copies = {name: value.clone() for name, value in statistics_of(model).items()}
    with _within_episode(model):
        return functional_call(model, {**parameters, **copies}, (examples.inputs,))  # type: ignore[no-any-return]


def mean_loss(model: nn.Module, parameters: Parameters, examples: Examples) -> Float[Tensor, ""]:
    """The cross entropy of a target."""
    return nn.functional.cross_entropy(told(model, parameters, examples), examples.targets)


@contextmanager
def _within_episode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for all but batch normalisation while the block runs."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = isinstance(module, BATCHNORM)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
