"""Black-box tuning."""

from dataclasses import dataclass
from typing import Literal

import cmaes
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lfm.prompting.base import Prompt


@dataclass(slots=True)
class Search:
    """What `BBT` remembers.

    Attributes:
        optimizer: Draws points and learns from their scores.
        matrix: Leads from a point to a change of the prompt; fixed.
        initial: The prompt at the point 0.
        points: Those that were asked last.
        best: The point with the smallest score.
        score: That score.
    """

    optimizer: cmaes.CMA
    matrix: Float[Tensor, "numbers dimension"]
    initial: Float[Tensor, "length width"]
    points: "list[np.ndarray[tuple[int], np.dtype[np.float64]]]"
    best: "np.ndarray[tuple[int], np.dtype[np.float64]]"
    score: float = float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class BBT(Prompt):
    """Search a soft prompt in a small random subspace, with evolution in the place of gradients.

    1. Project. A prompt is `p = A z + p0`: `z` has `dimension` numbers, `A` is drawn once and stays, `p0` is the start.
    2. Ask. CMA-ES draws `population` points `z` around its mean; the model says what it makes of each prompt.
    3. Score. The mean loss of the examples' label words, from the probabilities of these words alone.
    4. Tell. CMA-ES moves its mean and its covariance towards the better points.

    The result is `A z + p0` for the best `z` of all that were tried.

    Attributes:
        length: Virtual tokens, at least 1. The paper's prompt length.
        dimension: Of the subspace, at least 2. The paper's d.
        population: Points drawn at once, at least 2. The paper's lambda.
        sigma: How far the first points are from 0, above 0.
        alpha: Multiplies what `projection` says, above 0.
        projection: ``uniform`` draws `A` evenly from +-alpha / sqrt(dimension), the range of a linear layer's start;
            ``normal`` with the standard deviation `alpha * spread / (sqrt(dimension) * sigma)`, so that the first
            prompts differ from the start about as word embeddings differ, as BBTv2 (arXiv:2205.11200) does.
        loss: ``cross_entropy`` among the labels, or ``hinge``: every wrong label's log-probability has to be `margin`
            below the right one's. The paper takes the latter for pairs of sentences.
        margin: Of the hinge, above 0.
        budget: Prompts that are tried, a multiple of `population`: all of it is spent.

    Differs from the paper:
        It is for decoders: the label's word is the first token of the answer, not that of a mask. The prompt that did
        best on the examples is the result, where the paper keeps the one that does best on as many others.

    Example:
        >>> probabilities = torch.tensor([[[0.2, 0.1]]])  # one prompt, one row, two labels
        >>> BBT().score(probabilities, torch.tensor([0]))  # log 1.5
        tensor([0.4055])

    Reference:
        Sun et al., "Black-Box Tuning for Language-Model-as-a-Service", ICML 2022.
        https://arxiv.org/abs/2201.03514
    """

    reference, area, leaf = "arXiv:2201.03514", "tuning", "A2a"

    length: int = 50
    dimension: int = 500
    population: int = 20
    sigma: float = 1.0
    alpha: float = 1.0
    projection: Literal["uniform", "normal"] = "uniform"
    loss: Literal["cross_entropy", "hinge"] = "cross_entropy"
    margin: float = 2.0
    budget: int = 8000

    def __post_init__(self) -> None:
        self.require(self.length >= 1, "length", "length >= 1")
        self.require(self.dimension >= 2, "dimension", "dimension >= 2")
        self.require(self.population >= 2, "population", "population >= 2")
        self.require(self.sigma > 0, "sigma", "sigma > 0")
        self.require(self.alpha > 0, "alpha", "alpha > 0")
        self.require(self.projection in ("uniform", "normal"), "projection", "one of uniform, normal")
        self.require(self.loss in ("cross_entropy", "hinge"), "loss", "one of cross_entropy, hinge")
        self.require(self.margin > 0, "margin", "margin > 0")
        whole = self.budget >= 1 and self.budget % self.population == 0
        self.require(whole, "budget", "a multiple of population, at least 1 of them")

    @override
    def start(self, initial: Float[Tensor, "length width"], *, spread: float, seed: int) -> Search:
        draws = torch.Generator().manual_seed(seed)
        shape = (initial.numel(), self.dimension)
        if self.projection == "normal":
            scale = self.alpha * spread / (self.dimension**0.5 * self.sigma)
            matrix = scale * torch.randn(shape, generator=draws)
        else:
            matrix = self.alpha / self.dimension**0.5 * (2 * torch.rand(shape, generator=draws) - 1)
        middle = np.zeros(self.dimension)
        optimizer = cmaes.CMA(mean=middle, sigma=self.sigma, seed=seed, population_size=self.population)
        return Search(optimizer, matrix, initial.detach().float().cpu(), [], middle)

    @override
    def ask(self, state: Search) -> Float[Tensor, "candidates length width"]:
        state.points = [state.optimizer.ask() for _ in range(self.population)]
        return torch.stack([self._prompt(state, point) for point in state.points])

    @override
    def tell(self, state: Search, scores: Float[Tensor, "candidates"]) -> Search:
        found = list(zip(state.points, scores.tolist(), strict=True))
        point, score = min(found, key=lambda pair: pair[1])
        if score < state.score:
            state.best, state.score = point, score
        state.optimizer.tell(found)
        return state

    @override
    def best(self, state: Search) -> Float[Tensor, "length width"]:
        return self._prompt(state, state.best)

    def _prompt(self, state: Search, point: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Tensor:
        return state.initial + (state.matrix @ torch.from_numpy(point).float()).view_as(state.initial)

    @override
    def score(
        self, probabilities: Float[Tensor, "candidates rows choices"], labels: Int[Tensor, "rows"]
    ) -> Float[Tensor, "candidates"]:
        said = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
        right = labels.expand(said.shape[:2])[..., None]
        if self.loss == "cross_entropy":
            return -said.log_softmax(dim=-1).gather(-1, right).mean(dim=(1, 2))
        over = (said - said.gather(-1, right) + self.margin).clamp(min=0).scatter(-1, right, 0.0)
        return over.sum(dim=-1).mean(dim=1)
