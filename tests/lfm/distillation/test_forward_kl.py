import math

import pytest
import torch

from lfm.distillation.forward_kl import ForwardKL
from lfm.errors import HyperparameterError


def logits(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def slow(student, teacher, temperature):
    """T**2 * KL(p || q) of softened softmaxes, one probability after another."""
    losses = []
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p = [math.exp(x / temperature) for x in t]
        q = [math.exp(x / temperature) for x in s]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        losses.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return torch.tensor(losses)


def measured(method, student, teacher):
    return method.token_loss(*((x / method.temperature).log_softmax(-1) for x in (student, teacher)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 2), (7, 5)])
def test_it_is_the_rescaled_divergence_of_softened_distributions(shape, temperature):
    student, teacher = logits(*shape, seed=0), logits(*shape, seed=1)
    got = measured(ForwardKL(temperature=temperature), student, teacher)
    torch.testing.assert_close(got, slow(student, teacher, temperature), atol=1e-5, rtol=1e-5)


def test_equal_models_give_zero_and_no_gradient():
    student = logits(4, 6, seed=0).requires_grad_()
    loss = measured(ForwardKL(temperature=2.0), student, student.detach())
    torch.testing.assert_close(loss, torch.zeros(4))
    loss.sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros(4, 6), atol=1e-6, rtol=0)


def test_its_gradient_is_that_of_the_softened_shares():
    student, teacher = logits(3, 5, seed=0).requires_grad_(), logits(3, 5, seed=1)
    measured(ForwardKL(temperature=2.0), student, teacher).sum().backward()
    # d/dz of T**2 * KL is T * (q - p).
    torch.testing.assert_close(student.grad, 2 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).detach())


def test_at_a_high_temperature_it_matches_centred_logits():
    student, teacher = logits(3, 5, seed=0).double().requires_grad_(), logits(3, 5, seed=1).double()
    measured(ForwardKL(temperature=1000.0), student, teacher).sum().backward()
    centred = [x - x.mean(dim=-1, keepdim=True) for x in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 5, atol=1e-2, rtol=1e-2)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(HyperparameterError, match="temperature=0, expected temperature > 0"):
        ForwardKL(temperature=0)
