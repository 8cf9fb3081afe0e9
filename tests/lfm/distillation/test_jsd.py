import math

import pytest
import torch

from lfm.distillation.jsd import JSD
from lfm.errors import HyperparameterError


def log_shares(*shape, seed):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (made * 2).log_softmax(-1)


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow(student, teacher, beta):
    """The paper's formula, one token after another."""
    losses = []
    for q, p in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True):
        mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        losses.append(beta * divergence(p, mixed) + (1 - beta) * divergence(q, mixed))
    return torch.tensor(losses, dtype=torch.float64)


def pairwise(p, q):
    """KL(p || q) of each token, from log-probabilities."""
    return torch.tensor([divergence(*x) for x in zip(p.exp().tolist(), q.exp().tolist(), strict=True)]).double()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1, 2), (7, 5)])
def test_it_compares_both_with_their_mixture(shape, beta):
    student, teacher = log_shares(*shape, seed=0), log_shares(*shape, seed=1)
    torch.testing.assert_close(JSD(beta=beta).token_loss(student, teacher), slow(student, teacher, beta))


def test_equal_models_give_zero_and_no_gradient():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = JSD(beta=0.3).token_loss(logits.log_softmax(-1), logits.detach().log_softmax(-1))
    torch.testing.assert_close(loss, torch.zeros(4))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(4, 6), atol=1e-6, rtol=0)


def test_it_is_symmetric_in_the_middle_only():
    student, teacher = log_shares(4, 5, seed=0), log_shares(4, 5, seed=1)
    torch.testing.assert_close(JSD().token_loss(student, teacher), JSD().token_loss(teacher, student))
    turned = JSD(beta=0.3).token_loss(teacher, student)
    torch.testing.assert_close(JSD(beta=0.7).token_loss(student, teacher), turned)
    assert not torch.allclose(JSD(beta=0.3).token_loss(student, teacher), turned)


def test_near_its_ends_and_rescaled_it_is_one_of_the_two_divergences():
    student, teacher = log_shares(4, 5, seed=0), log_shares(4, 5, seed=1)
    near = 1e-6
    forward = JSD(beta=near).token_loss(student, teacher) / near
    reverse = JSD(beta=1 - near).token_loss(student, teacher) / near
    torch.testing.assert_close(forward, pairwise(teacher, student), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reverse, pairwise(student, teacher), atol=1e-4, rtol=1e-4)


def test_the_ends_are_the_two_divergences_as_trl_has_them():
    student, teacher = log_shares(4, 5, seed=0), log_shares(4, 5, seed=1)
    ends = [JSD(beta=b, convention="trl").token_loss(student, teacher) for b in (0.0, 1.0)]
    torch.testing.assert_close(ends, [pairwise(teacher, student), pairwise(student, teacher)])
    inside = JSD(beta=0.3, convention="trl").token_loss(student, teacher)
    torch.testing.assert_close(inside, JSD(beta=0.3).token_loss(student, teacher))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_of_the_papers_formula_teach_nothing_and_are_refused(beta):
    student, teacher = log_shares(4, 5, seed=0), log_shares(4, 5, seed=1)
    torch.testing.assert_close(slow(student, teacher, beta), torch.zeros(4).double())
    with pytest.raises(HyperparameterError, match=f"beta={beta}, expected 0 < beta < 1"):
        JSD(beta=beta)


def test_it_stays_bounded_where_one_excludes_what_the_other_says():
    student, teacher = (torch.tensor([[x, -x]]).log_softmax(-1) for x in (100.0, -100.0))
    torch.testing.assert_close(JSD().token_loss(student, teacher), torch.tensor([math.log(2)]))


@pytest.mark.parametrize("fields", [{"beta": 1.5, "convention": "trl"}, {"student_share": 2.0}, {"temperature": -1.0}])
def test_what_is_out_of_range_is_refused(fields):
    with pytest.raises(HyperparameterError, match=f"{next(iter(fields))}="):
        JSD(**fields)
