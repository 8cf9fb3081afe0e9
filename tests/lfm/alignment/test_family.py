"""What every alignment method keeps, by being a file of the family."""

import pickle

import numpy as np
import pytest
import torch

from lfm.alignment.base import at, barrier
from tests.lfm.alignment.networks import SHAPE, made
from tests.lfm.variants import every

METHODS = pytest.mark.parametrize("method", every("alignment"))
KINDS = pytest.mark.parametrize("kind", ["mlp", "cnn"])


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(kind):
    return tuple(made(kind, seed=seed) for seed in (0, 1))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def distance(a, b, spec):
    return sum(float((a[n].double() - b[n].double()).square().sum()) for n in a if n not in spec.carried)


@METHODS
@KINDS
def test_each_order_is_a_permutation_and_the_network_computes_the_same(method, kind):
    base, model = pair(kind)
    images = torch.rand(9, *SHAPE, generator=draw())
    said = model(images)
    found = method.solve(base.state_dict(), model.state_dict(), method.groups(model), draw())
    assert found.orders.keys() == found.spec.groups.keys()
    assert all(order.sort().values.tolist() == list(range(len(order))) for order in found.orders.values())
    model.load_state_dict(found.apply({n: v.clone() for n, v in model.state_dict().items()}))
    torch.testing.assert_close(model(images), said, rtol=1e-5, atol=1e-5)
    assert 0 <= found.moved() <= 1


@METHODS
@KINDS
def test_it_comes_no_further_from_the_base_and_moves_nothing_of_what_it_gets(method, kind):
    base, model = (m.state_dict() for m in pair(kind))
    before = [{n: v.clone() for n, v in tensors.items()} for tensors in (base, model)]
    spec = method.groups(made(kind))
    aligned = method.solve(base, model, spec, draw()).apply(model)
    assert distance(base, aligned, spec) <= distance(base, model, spec)
    assert same(base, before[0])
    assert same(model, before[1])
    assert all(aligned[n].dtype == v.dtype and aligned[n].shape == v.shape for n, v in model.items())


@METHODS
def test_it_gives_the_same_again_whatever_is_drawn_elsewhere_and_in_another_process(method):
    base, model = pair("mlp")
    spec = method.groups(base)
    found = method.solve(base.state_dict(), model.state_dict(), spec, draw(3))
    torch.manual_seed(12345)
    np.random.seed(1)
    drawn = torch.get_rng_state(), np.random.get_state()[1]
    again = pickle.loads(pickle.dumps(method)).solve(base.state_dict(), model.state_dict(), spec, draw(3))
    assert same(found.orders, again.orders)
    assert torch.equal(torch.get_rng_state(), drawn[0]), "it draws from the generator that all share"
    assert (np.random.get_state()[1] == drawn[1]).all()


@METHODS
def test_a_network_is_already_aligned_to_itself(method):
    tensors = made("cnn").state_dict()
    assert method.solve(tensors, tensors, method.groups(made("cnn")), draw()).moved() == 0


def test_the_way_between_two_models_is_straight_and_ends_at_them():
    a, b = (m.state_dict() for m in pair("cnn"))
    assert same(at((a, b), 0.0), a)
    assert all(torch.equal(v, b[n]) for n, v in at((a, b), 1.0).items() if v.is_floating_point())
    for name, value in at((a, b), 0.3).items():
        if not value.is_floating_point():
            assert torch.equal(value, a[name])
            continue
        slow = [0.7 * x + 0.3 * y for x, y in zip(a[name].flatten().tolist(), b[name].flatten().tolist(), strict=True)]
        torch.testing.assert_close(value.flatten(), torch.tensor(slow))


def test_a_barrier_is_what_rises_above_the_line_between_both_ends():
    points, losses = [0.0, 0.25, 0.5, 1.0], [1.0, 1.2, 4.0, 2.0]
    lines = [1.0, 1.25, 1.5, 2.0]
    height = max(loss - line for loss, line in zip(losses, lines, strict=True))
    assert barrier(points, losses) == (height, 0.5) == (2.5, 0.5)
    assert barrier([0.0, 0.5, 1.0], [1.0, 0.2, 2.0]) == (0, 0)
