"""Whether a difference between two models on the same documents is more than chance."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A difference with its 95 % interval.

    Attributes:
        mean: `one - other`, each the sum of its documents' values over the sum of their weights.
        low: 2.5th percentile over resampled documents.
        high: 97.5th percentile.
    """

    mean: float
    low: float
    high: float


def paired_bootstrap(
    one: Float[ndarray, "documents"],
    other: Float[ndarray, "documents"],
    weights: Float[ndarray, "documents"],
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Resample documents with replacement; both models are looked at on the same ones.

    Args:
        one: A sum for each document: of its tokens' losses, or a score times its weight.
        other: The same of the other model.
        weights: What the sums are divided by: numbers of tokens, or ones.
        draws: How many times documents are drawn.
        seed: Of the draws.

    Reference:
        Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004.
        https://aclanthology.org/W04-3250
    """
    gaps = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    weights = np.asarray(weights, np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):  # one draw at a time: documents x draws may not fit in memory
        counts = np.bincount(generator.integers(len(gaps), size=len(gaps)), minlength=len(gaps))
        means[i] = counts @ gaps / (counts @ weights)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(mean=float(gaps.sum() / weights.sum()), low=float(low), high=float(high))
