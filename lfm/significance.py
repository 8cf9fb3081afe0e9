"""Whether a difference between two models on the same documents is more than chance."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lfm.errors import LfmError

# If five documents all say the same, chance alone does so too in one of sixteen cases: more than the interval's 5 %.
FEWEST = 6


class NotComparable(LfmError, ValueError):
    """Values that a difference cannot be told from."""

    def __init__(self, what: str, allowed: str, fix: str) -> None:
        super().__init__(what, allowed, fix)
        self.what, self.allowed, self.fix = what, allowed, fix

    def __str__(self) -> str:
        return f"paired bootstrap: {self.what}, expected {self.allowed}. {self.fix}"


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
    other: Float[ndarray, "_"],
    weights: Float[ndarray, "_"],
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Resample documents with replacement; both models are looked at on the same ones.

    A document of weight 0 says nothing and is left out.

    Args:
        one: A sum for each document: of its tokens' losses, or a score times its weight.
        other: The same of the other model.
        weights: What the sums are divided by: numbers of tokens, or ones.
        draws: How many times documents are drawn.
        seed: Of the draws.

    Raises:
        NotComparable: The three are not of the same documents, a value is no number, or there are too few documents.

    Reference:
        Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004.
        https://aclanthology.org/W04-3250
    """
    if not len(one) == len(other) == len(weights):
        what = f"{len(one)} and {len(other)} values with {len(weights)} weights"
        raise NotComparable(what, "as many of each", "Measure both on the same documents.")
    gaps = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    weights = np.asarray(weights, np.float64)
    if not (np.isfinite(gaps).all() and np.isfinite(weights).all() and (weights >= 0).all()):
        raise NotComparable(
            "values that are infinite or not a number, or weights below 0", "finite ones", "Look at what was measured."
        )
    gaps, weights = gaps[weights > 0], weights[weights > 0]
    if len(gaps) < FEWEST:
        raise NotComparable(f"{len(gaps)} documents", f"at least {FEWEST}", "Measure on more.")
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):  # one draw at a time: documents x draws may not fit in memory
        counts = np.bincount(generator.integers(len(gaps), size=len(gaps)), minlength=len(gaps))
        means[i] = counts @ gaps / (counts @ weights)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(mean=float(gaps.sum() / weights.sum()), low=float(low), high=float(high))
