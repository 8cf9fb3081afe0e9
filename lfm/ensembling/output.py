"""The output ensemble."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lfm.ensembling.base import Combine


@dataclass(frozen=True, kw_only=True, slots=True)
class Output(Combine):
    """Ask several models and average their answers: where they err in different ways, errors cancel.

    With `said[k]`, the log-probabilities of model k at one place:

    1. Ask. Every model tells the same classes, or the same next token, in the same order.
    2. Weigh. Model k counts `weights[k]`, or all count the same.
    3. Combine. ``mean`` averages probabilities, ``geometric`` their logarithms, and so the logits, and ``max`` takes
       all from the model that is surest of its likeliest class.

    The result is `log(sum(weights[k] * exp(said[k])))`. Its loss is never above the mean of the models' losses.

    Attributes:
        combination: ``mean``, ``geometric``, which is made to sum to 1 again and is what averaging logits gives (as
            fusion_bench does), or ``max``; of models that are as sure as each other the first one counts.
        weights: How much each model counts, in their order: none below 0, together 1. None counts all the same.

    Differs from the paper:
        It surveys voting by labels as well; here probabilities are combined, which says more where they are known.

    Example:
        >>> said = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]]).log()
        >>> Output().combine(said).exp()
        tensor([[0.7000, 0.3000]])

    Reference:
        Dietterich, "Ensemble Methods in Machine Learning", Multiple Classifier Systems 2000.
        https://doi.org/10.1007/3-540-45014-9_1
    """

    reference, area, leaf = "https://doi.org/10.1007/3-540-45014-9_1", "reuse", "C1"

    combination: Literal["mean", "geometric", "max"] = "mean"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        self.require(self.combination in ("mean", "geometric", "max"), "combination", "one of mean, geometric, max")
        self.require(self.weights is None or self.combination != "max", "weights", "none where combination is max")
        fair = self.weights is None or (min(self.weights, default=-1) >= 0 and abs(sum(self.weights) - 1) < 1e-6)
        self.require(fair, "weights", "none, or numbers of at least 0 that sum to 1")

    @override
    def check(self, num_models: int) -> None:
        fits = self.weights is None or len(self.weights) == num_models
        self.require(fits, "weights", f"one number for each of the {num_models} models")

    @override
    def combine(self, said: Float[Tensor, "models *places classes"]) -> Float[Tensor, "*places classes"]:
        self.check(len(said))
        if self.combination == "max":
            surest = said.amax(dim=-1, keepdim=True).argmax(dim=0, keepdim=True)
            return said.gather(0, surest.expand(1, *said.shape[1:]))[0]
        weights = said.new_tensor(self.weights or (1 / len(said),) * len(said))
        if self.combination == "geometric":
            averaged: Tensor = torch.tensordot(weights, said, dims=1)
            return averaged.log_softmax(dim=-1)
        column = weights.log().reshape(-1, *(1 for _ in said.shape[1:]))
        return (said + column).logsumexp(dim=0)
