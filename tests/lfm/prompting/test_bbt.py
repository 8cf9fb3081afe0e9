import math

import cmaes
import numpy as np
import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.oracle import Oracle
from lfm.prompting.bbt import BBT

SMALL = {"length": 3, "dimension": 5, "population": 6, "budget": 60}


def started(method, width=4, spread=0.5, seed=3):
    return method.start(torch.linspace(-1, 1, method.length * width).view(-1, width), spread=spread, seed=seed)


def test_a_prompt_is_the_start_and_a_fixed_projection_of_the_point():
    method = BBT(**SMALL)
    state = started(method)
    matrix, initial = state.matrix.clone(), state.initial.clone()
    for _ in range(3):
        prompts = method.ask(state)
        assert prompts.shape == (6, 3, 4)
        for prompt, point in zip(prompts, state.points, strict=True):
            flat = [
                initial.flatten()[i].item() + sum(matrix[i, j].item() * point[j] for j in range(5)) for i in range(12)
            ]
            torch.testing.assert_close(prompt.flatten(), torch.tensor(flat, dtype=torch.float32))
        state = method.tell(state, prompts.square().sum(dim=(1, 2)))
    assert torch.equal(state.matrix, matrix)
    assert torch.equal(state.initial, initial)


def test_the_points_are_those_of_cma_es():
    """The library alone, told the same scores, asks for the same points."""
    method = BBT(**SMALL, sigma=0.7)
    state = started(method)
    oracle = cmaes.CMA(mean=np.zeros(5), sigma=0.7, seed=3, population_size=6)
    for _ in range(4):
        method.ask(state)
        wanted = [oracle.ask() for _ in range(6)]
        np.testing.assert_array_equal(state.points, wanted)
        scores = [float(np.sum((w - 1) ** 2)) for w in wanted]
        oracle.tell(list(zip(wanted, scores, strict=True)))
        state = method.tell(state, torch.tensor(scores, dtype=torch.float64))


@pytest.mark.parametrize("projection", ["uniform", "normal"])
def test_the_projection_has_its_spread(projection):
    method = BBT(length=50, dimension=400, sigma=2.0, alpha=3.0, projection=projection)
    matrix = started(method, width=32, spread=0.5).matrix
    if projection == "normal":
        assert matrix.std().item() == pytest.approx(3.0 * 0.5 / (math.sqrt(400) * 2.0), rel=0.01)
    else:
        assert matrix.abs().max().item() == pytest.approx(3.0 / math.sqrt(400), rel=0.001)
        assert matrix.std().item() == pytest.approx(3.0 / math.sqrt(3 * 400), rel=0.01)


def test_with_normal_projection_the_first_prompts_differ_as_words_do():
    method = BBT(length=50, dimension=300, population=30, budget=30, sigma=0.2, projection="normal")
    state = started(method, width=32, spread=0.4)
    assert (method.ask(state) - state.initial).std().item() == pytest.approx(0.4, rel=0.05)


def test_all_of_the_budget_is_spent_and_the_best_of_all_is_kept():
    method = BBT(**SMALL)
    target = torch.full((3, 4), 0.3)
    asked = []

    def distance(prompts):
        asked.append(prompts)
        return (prompts - target).square().sum(dim=(1, 2))

    oracle, state = Oracle(distance, budget=method.budget), started(method)
    for _ in range(method.budget // method.population):
        state = method.tell(state, oracle(method.ask(state)))
    assert oracle.spent == method.budget == 60
    every = torch.cat(asked)
    best = (every - target).square().sum(dim=(1, 2)).argmin()
    torch.testing.assert_close(method.best(state), every[best])
    assert best >= 6, "it got better than its first guess"


def test_the_same_seed_searches_the_same():
    method = BBT(**SMALL)
    one, again, other = (method.ask(started(method, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("loss", ["cross_entropy", "hinge"])
def test_scores_are_those_of_plain_loops(loss):
    torch.manual_seed(0)
    probabilities, labels = torch.rand(3, 4, 5, dtype=torch.float64) / 9, torch.tensor([0, 4, 2, 2])
    got = BBT(loss=loss, margin=0.5).score(probabilities, labels)
    for c in range(3):
        total = 0.0
        for row in range(4):
            said, right = probabilities[c, row].tolist(), int(labels[row])
            if loss == "hinge":
                wrong = [i for i in range(5) if i != right]
                total += sum(max(0.0, math.log(said[i]) - math.log(said[right]) + 0.5) for i in wrong)
            else:
                total -= math.log(said[right] / sum(said))
        assert got[c].item() == pytest.approx(total / 4)


def test_a_word_that_is_never_said_has_a_finite_score():
    assert BBT().score(torch.tensor([[[0.0, 1.0]]]), torch.tensor([0])).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"length": 0}, "length >= 1"),
        ({"dimension": 1}, "dimension >= 2"),
        ({"population": 1}, "population >= 2"),
        ({"sigma": 0.0}, "sigma > 0"),
        ({"alpha": 0.0}, "alpha > 0"),
        ({"projection": "he"}, "one of uniform, normal"),
        ({"loss": "accuracy"}, "one of cross_entropy, hinge"),
        ({"margin": 0.0}, "margin > 0"),
        ({"budget": 8001}, "a multiple of population"),
        ({"budget": 0}, "a multiple of population"),
    ],
)
def test_fields_have_ranges(fields, said):
    with pytest.raises(HyperparameterError, match=said):
        BBT(**fields)
