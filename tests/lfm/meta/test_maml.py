"""MAML, against gradient descent that is written out, and against finite differences."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lfm.errors import HyperparameterError
from lfm.meta.base import Episode, Examples
from lfm.meta.maml import MAML

RATE = 0.3


class Smooth(nn.Module):
    """A network whose loss has derivatives of every order."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Smooth().double()


@pytest.fixture
def episode():
    draw = torch.Generator().manual_seed(1)
    support, query = (torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (4, 5))
    return Episode(Examples(support, torch.tensor([0, 1, 0, 1])), Examples(query, torch.tensor([1, 1, 0, 0, 1])))


def outer(method, model, episode, parameters=None, *, training=True):
    parameters = parameters or dict(model.named_parameters())
    return method.outer(model, method.adapt(model, parameters, episode.support, training=training), episode.query)


def written_out(parameters, examples):
    """The mean loss, without a module."""
    hidden = torch.tanh(examples.inputs @ parameters["body.weight"].T + parameters["body.bias"])
    logits = hidden @ parameters["head.weight"].T + parameters["head.bias"]
    losses = [-(row - row.exp().sum().log())[int(t)] for row, t in zip(logits, examples.targets, strict=True)]
    return sum(losses) / len(losses)


def unrolled(model, episode, steps, rates, *, second_order=True):
    """The gradient of the query's loss through so many steps with a rate for each parameter, and what these gave."""
    start = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    moved = dict(start)
    for _ in range(steps):
        gradients = torch.autograd.grad(written_out(moved, episode.support), [*moved.values()], create_graph=True)
        moved = {
            n: p - rates(n) * (g if second_order else g.detach())
            for (n, p), g in zip(moved.items(), gradients, strict=True)
        }
    loss = len(episode.query.targets) * written_out(moved, episode.query)
    return dict(zip(start, torch.autograd.grad(loss, [*start.values()]), strict=True)), moved


def gradient(method, model, episode):
    loss = outer(method, model, episode)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]), strict=True))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_outer_gradient_goes_through_all_steps(model, episode, steps):
    found = gradient(MAML(learning_rate=RATE, steps=steps), model, episode)
    wanted, _ = unrolled(model, episode, steps, lambda name: RATE)
    first, _ = unrolled(model, episode, steps, lambda name: RATE, second_order=False)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
        assert (value - first[name]).abs().max() > 1e-3, "the second order matters here"


def test_the_outer_gradient_is_what_finite_differences_say(model, episode):
    method = MAML(learning_rate=RATE, steps=3)
    found = gradient(method, model, episode)
    for name, parameter in model.named_parameters():
        for i in range(parameter.numel()):
            costs = []
            for change in (1e-5, -1e-5):
                moved = parameter.detach().clone()
                moved.view(-1)[i] += change
                others = {**dict(model.named_parameters()), name: moved.requires_grad_()}
                costs.append(outer(method, model, episode, others).item())
            assert found[name].view(-1)[i].item() == pytest.approx((costs[0] - costs[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_to_first_order_it_is_the_gradient_at_the_adapted_parameters(model, episode):
    method = MAML(learning_rate=RATE, steps=3, first_order=True)
    _, moved = unrolled(model, episode, 3, lambda name: RATE)
    there = {n: p.detach().requires_grad_() for n, p in moved.items()}
    loss = len(episode.query.targets) * written_out(there, episode.query)
    wanted = torch.autograd.grad(loss, [*there.values()])
    for found, value in zip(gradient(method, model, episode).values(), wanted, strict=True):
        torch.testing.assert_close(found, value)


def test_anil_is_maml_with_a_rate_of_0_for_the_body(model, episode):
    method = MAML(learning_rate=RATE, steps=3, anil=True)
    wanted, moved = unrolled(model, episode, 3, lambda name: RATE if name.startswith("head.") else 0.0)
    found = gradient(method, model, episode)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    adapted = method.adapt(model, dict(model.named_parameters()), episode.support, training=True)
    for name, value in moved.items():
        torch.testing.assert_close(adapted[name], value)
    assert torch.equal(adapted["body.weight"], model.body.weight)


def test_a_test_has_steps_of_its_own_and_no_way_back(model, episode):
    parameters = dict(model.named_parameters())
    method = MAML(learning_rate=RATE, steps=1, evaluation_steps=4)
    with torch.no_grad():  # as the loop looks at held-out data
        adapted = method.adapt(model, parameters, episode.support, training=False)
    _, moved = unrolled(model, episode, 4, lambda name: RATE)
    for name, value in adapted.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, moved[name].detach())


@pytest.mark.parametrize(("field", "value"), [("learning_rate", 0.0), ("steps", 0), ("evaluation_steps", 0)])
def test_ranges_are_checked(field, value):
    with pytest.raises(HyperparameterError, match=f"MAML: {field}={value}"):
        MAML(**{field: value})


def test_a_head_that_does_not_learn_is_not_adapted_alone():
    MAML(anil=True).check(head=True)
    MAML().check(head=False)
    with pytest.raises(HyperparameterError, match="anil=True, expected false where no head is learnt"):
        MAML(anil=True).check(head=False)


def test_each_target_of_the_query_costs_its_cross_entropy(model, episode):
    parameters = dict(model.named_parameters())
    found = MAML().outer(model, parameters, episode.query)
    logits = model(episode.query.inputs)
    wanted = sum(F.cross_entropy(row[None], t[None]) for row, t in zip(logits, episode.query.targets, strict=True))
    torch.testing.assert_close(found, wanted)
