"""The contracts of ensembling: several models answer as one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from lfm.method import Method, Needs


class Ensemble(Method, ABC):
    """Makes one model of several: by `Combine` of what they say, or by `Build` of one network out of their weights."""

    __slots__ = ()
    needs = Needs(access="weights", data="none", models=(1, None))

    def check(self, num_models: int) -> None:
        """Refuse a number of models that its fields do not fit, before anything is read.

        Raises:
            HyperparameterError: A field has a number for each model, but not so many.
        """
        return


class Combine(Ensemble, ABC):
    """Keeps the models whole: each is asked, and what they say is combined.

    Logarithms go in and out, so that nothing is lost of what is very unlikely.
    """

    __slots__ = ()
    needs = Needs(access="probabilities", data="none", models=(1, None))

    @abstractmethod
    def combine(self, said: Float[Tensor, "models *places classes"]) -> Float[Tensor, "*places classes"]:
        """What all of them say together.

        Args:
            said: Each model's log-probabilities at the same places, float32; it is not modified.

        Returns:
            Log-probabilities, each place's from what is said there alone.
        """


class Build(Ensemble, ABC):
    """Makes one network of a base and of experts fine-tuned from it; what is new in it learns from unlabelled rows.

    Whoever calls it builds the base's network anew, fills it with what `merge` and the experts' deltas say, and
    follows with Adam the gradient of the mean of `objective`, on as many rows of each set at every step, for what is
    neither the base's nor an expert's.

    Attributes:
        steps: Steps of the optimizer; 0 leaves what is new as it starts.
        learning_rate: Of each of them.
        batch_size: Rows of each set in a step.
    """

    __slots__ = ()
    needs = Needs(access="gradients", data="unlabelled", models=(1, None), strategies=("single", "ddp"))

    steps: int
    learning_rate: float
    batch_size: int

    @abstractmethod
    def build(self, network: nn.Module, num_experts: int, *, causal: bool) -> Mapping[str, str]:
        """Put what is new into the base's network, in place; what was there keeps its names.

        What starts at random is drawn from torch's generator.

        Args:
            network: The base's, on any device.
            num_experts: How many experts there are.
            causal: Whether no place of a text may depend on what follows it.

        Returns:
            By the name of each of the base's parameters that stay as they are that of the new one that holds the
            experts' deltas of it, of shape (experts, *shape).

        Raises:
            NoBlocks: The network has no place for it.
        """

    @abstractmethod
    def merge(
        self, name: str, base: Float[Tensor, "*shape"], experts: Float[Tensor, "experts *shape"]
    ) -> Float[Tensor, "*shape"]:
        """What any other parameter becomes, as `lfm.merging.base.Merge.merge` says it."""

    @abstractmethod
    def objective(self, logits: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
        """What is made small: a number for each row, or for each position of a text, from the network's logits."""
