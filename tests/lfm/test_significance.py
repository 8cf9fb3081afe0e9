import random

import numpy as np
import pytest

from lfm.significance import Difference, NotComparable, paired_bootstrap


def slowly(one, other, weights, draws, seed):
    """The same, with lists: draw documents, add up, divide, sort."""
    generator = random.Random(seed)
    found = []
    for _ in range(draws):
        drawn = [generator.randrange(len(one)) for _ in one]
        found.append((sum(one[i] for i in drawn) - sum(other[i] for i in drawn)) / sum(weights[i] for i in drawn))
    found.sort()
    return found[round(0.025 * draws)], found[round(0.975 * draws)]


def documents(seed, number=40, gap=0.2):
    draw = np.random.default_rng(seed)
    weights = draw.integers(1, 30, number).astype(float)
    one = weights * draw.gamma(3.0, 1.0, number)
    return one, one - weights * draw.normal(gap, 0.5, number), weights


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_is_that_of_a_slow_loop(seed):
    one, other, weights = documents(seed)
    found = paired_bootstrap(one, other, weights, draws=4000)
    low, high = slowly(one.tolist(), other.tolist(), weights.tolist(), 4000, seed)
    assert found.mean == pytest.approx((one.sum() - other.sum()) / weights.sum())
    width = found.high - found.low
    assert found.low < found.mean < found.high
    assert found.low == pytest.approx(low, abs=0.06 * width)
    assert found.high == pytest.approx(high, abs=0.06 * width)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    truth, inside, times = 0.2, 0, 200
    for seed in range(times):
        found = paired_bootstrap(*documents(seed, number=60, gap=truth), draws=200)
        inside += found.low <= truth <= found.high
    assert 0.90 < inside / times < 0.98


def test_turning_it_round_turns_the_sign():
    one, other, weights = documents(0)
    found, turned = paired_bootstrap(one, other, weights), paired_bootstrap(other, one, weights)
    assert (turned.mean, turned.low, turned.high) == pytest.approx((-found.mean, -found.high, -found.low))


def test_the_same_seed_draws_the_same_and_equal_models_do_not_differ():
    one, other, weights = documents(1)
    assert paired_bootstrap(one, other, weights) == paired_bootstrap(one, other, weights)
    assert paired_bootstrap(one, other, weights) != paired_bootstrap(one, other, weights, seed=1)
    assert paired_bootstrap(one, one, weights) == Difference(mean=0.0, low=0.0, high=0.0)


def test_long_documents_count_for_more():
    weights = np.array([100.0, *[1.0] * 9])
    one = np.array([100.0, *[0.0] * 9])
    assert paired_bootstrap(one, np.zeros(10), weights).mean == pytest.approx(100 / 109)
    assert paired_bootstrap(one / weights, np.zeros(10), np.ones(10)).mean == pytest.approx(0.1)


def test_a_document_without_weight_changes_nothing():
    one, other, weights = documents(2)
    more = [np.append(values, 0.0) for values in (one, other, weights)]
    assert paired_bootstrap(*more) == paired_bootstrap(one, other, weights)


BAD = {
    "5 and 6 values with 6 weights, expected as many of each": (np.ones(5), np.ones(6), np.ones(6)),
    "values that are infinite or not a number": (np.array([*[1.0] * 6, np.nan]), np.ones(7), np.ones(7)),
    "weights below 0, expected finite ones": (np.ones(7), np.ones(7), -np.ones(7)),
    "5 documents, expected at least 6. Measure on more": (np.ones(9), np.zeros(9), np.array([1.0] * 5 + [0.0] * 4)),
    "0 documents, expected at least 6": (np.ones(0), np.ones(0), np.ones(0)),
}


@pytest.mark.parametrize("expected", BAD)
def test_what_cannot_be_compared_is_refused(expected):
    with pytest.raises(NotComparable, match=expected) as caught:
        paired_bootstrap(*BAD[expected])
    assert str(NotComparable(*caught.value.args)) == str(caught.value)
