import pickle

import pytest
import torch
from torch import nn

from lfm.oracle import BudgetSpent, GradientRefused, Oracle


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Softmax(dim=-1))


def test_it_says_what_the_model_says_and_counts_each_question(model):
    oracle, x = Oracle(model, budget=10), torch.randn(4, 3)
    torch.testing.assert_close(oracle(x), model(x).detach())
    assert (oracle.spent, oracle.budget) == (4, 10)
    oracle(x[:1])
    assert oracle.spent == 5


def test_beyond_the_budget_it_answers_nothing(model):
    oracle = Oracle(model, budget=5)
    oracle(torch.randn(4, 3))
    with pytest.raises(BudgetSpent) as caught:
        oracle(torch.randn(2, 3))
    assert str(caught.value).startswith("oracle: 2 more questions after 4, expected 5 in all.")
    assert oracle.spent == 4, "what was not answered costs nothing"
    oracle(torch.randn(1, 3))
    assert oracle.spent == 5


def test_without_a_budget_it_only_counts(model):
    oracle = Oracle(model)
    for _ in range(3):
        oracle(torch.randn(50, 3))
    assert oracle.spent == 150


def test_nobody_gets_a_gradient_through_it(model):
    oracle = Oracle(model)
    with pytest.raises(GradientRefused, match=r"a tensor of shape \(1, 3\) that requires a gradient"):
        oracle(torch.zeros(1, 3, requires_grad=True))
    assert oracle.spent == 0
    weight = torch.ones(4, requires_grad=True)
    (oracle(torch.zeros(1, 3)) * weight).sum().backward()
    assert weight.grad is not None, "an answer may be reckoned with"
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        oracle(torch.zeros(1, 3)).sum().backward()


def test_not_even_a_model_that_switches_gradients_on_lets_one_through(model):
    @torch.enable_grad()
    def eager(x):
        return model(x)

    assert not Oracle(eager)(torch.zeros(1, 3)).requires_grad


def test_its_errors_cross_processes():
    for error in (GradientRefused((1, 3)), BudgetSpent(4, 2, 5)):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
