"""What every merging method keeps, by being a file of the family."""

import pickle

import numpy as np
import pytest
import torch

import lfm
from operators.sharing.crew import Tally
from tests.lfm.variants import every

SHAPES = {"norm": (), "layers.0.bias": (1,), "layers.0.mlp.weight": (4, 5), "layers.1.mlp.weight": (5, 3), "head": (7,)}
METHODS = pytest.mark.parametrize("method", every("merging"))
EXPERTS = 2


@pytest.fixture
def given():
    """For each parameter the base's value, the experts' and all that an engine may know of it besides."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in SHAPES.items():
        base = torch.randn(shape, generator=draw)
        experts = base + 0.3 * torch.randn(EXPERTS, *shape, generator=draw)
        inputs = torch.randn(EXPERTS, 9, shape[-1] if shape else 1, generator=draw)
        known = {
            "fisher": torch.rand(EXPERTS, *shape, generator=draw),
            "gram": inputs.mT @ inputs,
            "coefficients": torch.tensor([0.3, 0.6]),
            "layer": torch.tensor(0),
        }
        found[name] = (base, experts, known)
    return found


def fit(method, given):
    """As an engine calls a method: a method that stacks layers gets one expert at a time."""
    stacks = method.layers(EXPERTS, 2) is not None
    return {n: (b, e[:1] if stacks else e, k) for n, (b, e, k) in given.items()}


def scanned(method, given, names):
    """What the passes find, the parameters looked at in the order of `names`."""
    found = {}
    places = {n: i for i, n in enumerate(given)}
    for _ in range(method.passes):
        tally = Tally()
        for name in names:
            base, experts, known = given[name]
            tally.add(places[name], method.scan(name, base, experts, {**found, **known}))
        if (total := tally.total()) is not None:
            found |= method.settle(total, found)
    return found


def merged(method, given, names=None):
    names = tuple(names or given)
    found = scanned(method, given, names)
    return {n: method.merge(n, given[n][0], given[n][1], {**found, **given[n][2]}) for n in names}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@METHODS
def test_a_base_that_is_said_not_to_be_read_changes_nothing(method, given):
    given = fit(method, given)
    other = {n: (torch.zeros(()).expand(b.shape), e, k) for n, (b, e, k) in given.items()}
    alike = same(merged(method, given), merged(method, other))
    assert alike or method.reads_base


@METHODS
def test_no_input_changes_and_shape_dtype_and_device_stay(method, given):
    method.check(EXPERTS)
    given = fit(method, given)
    before = {n: (b.clone(), e.clone(), {k: v.clone() for k, v in known.items()}) for n, (b, e, known) in given.items()}
    for name, value in merged(method, given).items():
        base, experts, known = given[name]
        assert (value.shape, value.dtype, value.device) == (base.shape, torch.float32, base.device)
        assert value.isfinite().all()
        assert torch.equal(base, before[name][0])
        assert torch.equal(experts, before[name][1])
        assert same(known, before[name][2])


@METHODS
def test_it_gives_the_same_again_whatever_is_drawn_elsewhere_and_in_another_process(method, given):
    given = fit(method, given)
    first = merged(method, given)
    torch.manual_seed(12345)
    np.random.seed(1)
    drawn = torch.get_rng_state(), np.random.get_state()[1]
    assert same(merged(pickle.loads(pickle.dumps(method)), given), first)
    assert torch.equal(torch.get_rng_state(), drawn[0]), "it draws from the generator that all share"
    assert (np.random.get_state()[1] == drawn[1]).all()


@METHODS
def test_parameters_may_come_in_any_order(method, given):
    given = fit(method, given)
    assert same(merged(method, given, reversed(given)), dict(reversed(merged(method, given).items())))


@METHODS
def test_what_goes_value_by_value_may_be_cut_anywhere(method, given):
    if not method.elementwise:
        pytest.skip("it sees parameters whole")
    whole = fit(method, given)
    cut = {}
    for name, (base, experts, known) in whole.items():
        for first in range(0, base.numel(), 3):
            part = slice(first, first + 3)

            def flat(stack, part=part):
                return stack.reshape(len(stack), -1)[:, part]

            kinds = {k: flat(v) if k == "fisher" else v for k, v in known.items()}
            cut[f"{name}[{first}]"] = (base.reshape(-1)[part], flat(experts), kinds)
    pieces, found = merged(method, cut), merged(method, whole)
    for name, value in found.items():
        joined = torch.cat([v for n, v in pieces.items() if n.startswith(f"{name}[")])
        torch.testing.assert_close(joined.reshape(value.shape), value, rtol=1e-6, atol=1e-7)
        if method.passes == 0 or integers(method, whole):
            assert torch.equal(joined.reshape(value.shape), value)


def integers(method, given):
    """Whether what its first pass adds up is exact."""
    parts = [method.scan(n, b, e, k) for n, (b, e, k) in given.items()]
    return all(p is None or not p.is_floating_point() for p in parts)


@pytest.mark.parametrize("name", lfm.names("merging"))
def test_experts_that_learnt_nothing_give_the_base(name, given):
    method = lfm.find(name)()
    given = fit(method, {n: (b, torch.stack([b] * EXPERTS), k) for n, (b, _, k) in given.items()})
    for parameter, value in merged(method, given).items():
        torch.testing.assert_close(value, given[parameter][0])
