"""What every meta-learning method keeps, by being a file of the family: on the network of few-shot learning."""

import pickle

import pytest
import torch

from lfm.meta.base import HEAD, Episode, Examples, told
from lfm.networks import ImageNetwork, Network, statistics_of
from tests.lfm.variants import every

METHODS = pytest.mark.parametrize("method", every("meta"))


def episode(seed=0):
    """Two classes of noise, of which one is a little brighter above and one below."""
    draw = torch.Generator().manual_seed(seed)

    def examples(number):
        targets = torch.arange(number) % 2
        images = torch.rand(number, 1, 8, 8, generator=draw)
        images[targets == 0, :, :4] += 0.1
        images[targets == 1, :, 4:] += 0.1
        return Examples(images, targets)

    return Episode(examples(6), examples(8))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = ImageNetwork(Network(widths=(4, 4)), (1, 8, 8), 2)
    made.layers[0].norm.running_mean.fill_(0.3)
    return made


def asked(method, model, of, *, training):
    parameters = dict(model.named_parameters())
    adapted = method.adapt(model, parameters, of.support, training=training)
    return adapted, method.outer(model, adapted, of.query)


@METHODS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_nothing_of_the_model_is_different_after_an_episode(method, model, training, mode):
    model.train(mode)
    model.layers[0].norm.eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    drawn = torch.get_rng_state()
    asked(method, model, episode(), training=training)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert len(statistics_of(model)) == 6
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn), "it draws from the generator that all share"
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@METHODS
def test_an_episode_costs_the_same_in_either_mode_of_the_model_and_in_another_process(method, model):
    _, first = asked(method, model.train(), episode(), training=True)
    _, other = asked(pickle.loads(pickle.dumps(method)), model.eval(), episode(), training=True)
    assert torch.equal(first, other)


@METHODS
def test_the_features_learn_from_the_query(method, model):
    adapted, loss = asked(method, model, episode(), training=True)
    assert loss.shape == ()
    assert adapted.keys() == dict(model.named_parameters()).keys()
    body = [p for n, p in model.named_parameters() if not n.startswith(f"{HEAD}.")]
    gradients = torch.autograd.grad(loss, body)
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@METHODS
def test_where_nothing_is_learnt_no_graph_is_left(method, model):
    with torch.no_grad():
        adapted, loss = asked(method, model, episode(), training=False)
    assert not loss.requires_grad
    assert all(value.grad_fn is None for value in adapted.values())


@METHODS
def test_following_the_outer_gradient_makes_tasks_cheaper(method, model):
    parameters = dict(model.named_parameters())
    costs = []
    for _ in range(8):
        _, loss = asked(method, model, episode(), training=True)
        gradients = torch.autograd.grad(loss, [*parameters.values()], materialize_grads=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= 1e-3 * gradient
        costs.append(loss.item())
    assert costs[-1] < costs[0]


def test_batch_normalisation_takes_the_examples_at_hand():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    found = told(norm, dict(norm.named_parameters()), Examples(x, torch.zeros(5)))
    for column in range(3):
        values = [float(v) for v in x[:, column]]
        mean = sum(values) / 5
        deviation = (sum((v - mean) ** 2 for v in values) / 5 + norm.eps) ** 0.5
        wanted = torch.tensor([(v - mean) / deviation for v in values])
        torch.testing.assert_close(found[:, column], wanted)


def test_dropout_is_off_within_an_episode():
    made = torch.nn.Sequential(torch.nn.Dropout(0.9)).train()
    x = torch.ones(4, 10)
    assert torch.equal(told(made, {}, Examples(x, torch.zeros(4))), x)
    assert made[0].training
