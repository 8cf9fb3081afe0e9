"""Prototypical networks, against loops over classes."""

import math

import pytest
import torch

from lfm.meta.base import Examples, told
from lfm.meta.proto_net import ProtoNet
from lfm.networks import ImageNetwork, Network


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ImageNetwork(Network(kind="mlp", widths=(6, 5), batchnorm=False), (1, 4, 4), 7).double()


def images(number, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(number, 1, 4, 4, generator=draw, dtype=torch.float64)


SUPPORT = Examples(images(6, 1), torch.tensor([2, 0, 1, 0, 2, 0]))
QUERY = Examples(images(4, 2), torch.tensor([0, 2, 1, 0]))


def prototypes(model):
    features = model.features(SUPPORT.inputs)
    found = []
    for c in range(3):
        own = [f for f, t in zip(features, SUPPORT.targets.tolist(), strict=True) if t == c]
        found.append(sum(own) / len(own))
    return found


def test_the_likelier_class_is_the_one_whose_mean_is_nearer(model):
    adapted = ProtoNet().adapt(model, dict(model.named_parameters()), SUPPORT, training=True)
    found = told(model, adapted, QUERY).softmax(dim=1)
    means = [p.tolist() for p in prototypes(model)]
    for row, feature in zip(found, model.features(QUERY.inputs).tolist(), strict=True):
        near = [math.exp(-sum((a - b) ** 2 for a, b in zip(p, feature, strict=True))) for p in means]
        for probability, one in zip(row, near, strict=True):
            assert probability.item() == pytest.approx(one / sum(near))
        assert int(row.argmax()) == max(range(3), key=lambda c: near[c])


def test_the_gradient_is_that_of_distances_and_the_head_has_none(model):
    method = ProtoNet()
    parameters = dict(model.named_parameters())
    method.outer(model, method.adapt(model, parameters, SUPPORT, training=True), QUERY).backward()
    body = [p for n, p in parameters.items() if not n.startswith("head.")]
    means = torch.stack(prototypes(model))
    distances = (model.features(QUERY.inputs)[:, None] - means).square().sum(dim=2)
    log_probabilities = (-distances).log_softmax(dim=1)
    loss = -sum(row[int(t)] for row, t in zip(log_probabilities, QUERY.targets, strict=True))
    for parameter, wanted in zip(body, torch.autograd.grad(loss, body), strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    assert model.head.weight.grad is None


def test_a_test_keeps_no_way_back(model):
    found = ProtoNet().adapt(model, dict(model.named_parameters()), SUPPORT, training=False)
    assert not found["head.weight"].requires_grad
    torch.testing.assert_close(found["head.weight"] / 2, torch.stack(prototypes(model)))
