"""What every merging method keeps that says it may be given any stretch of a parameter."""

import pytest
import torch

import lfm
from lfm.merging.base import survey
from lfm.merging.ties import TIES

SHAPE = (40, 7)
METHODS = [lfm.find(name)() for name in lfm.names() if name.startswith("merging/")]
METHODS += [TIES(density=0.5, convention="fusion_bench"), TIES(density=1.0, convention="peft")]


def given(method):
    """Base and experts of one parameter, and all that a method may be told of it."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=draw)
    number = max(2, method.needs.models[0])
    experts = base + 0.1 * torch.randn((number, *SHAPE), generator=draw)
    known = {
        "fisher": torch.rand((number, *SHAPE), generator=draw),
        "coefficients": torch.rand(number, generator=draw),
        "layer": torch.tensor(0),
    }
    return base, experts, known


def stretch(value, first, end):
    """The same values of what has the parameter's shape, flat; all of what has not."""
    if value.shape[-len(SHAPE) :] != SHAPE:
        return value
    return value.flatten(-len(SHAPE))[..., first:end].contiguous()


@pytest.mark.parametrize("method", [m for m in METHODS if m.elementwise], ids=repr)
@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_a_parameter_in_stretches_is_merged_and_scanned_as_it_is_whole(method, size):
    base, experts, known = given(method)
    parts = [(first, min(first + size, base.numel())) for first in range(0, base.numel(), size)]
    found = dict(survey(method, ["w"], lambda name: (base, experts)))

    def read(name):
        return tuple(stretch(v, *parts[int(name)]) for v in (base, experts))

    again = survey(method, map(str, range(len(parts))), read)
    assert again.keys() == found.keys()
    assert all(torch.equal(again[key], value) for key, value in found.items())
    whole = method.merge("w", base, experts, {**found, **known})
    told = [{k: stretch(v, *part) for k, v in {**found, **known}.items()} for part in parts]
    flat = torch.cat([method.merge("w", *read(str(i)), told[i]) for i in range(len(parts))])
    torch.testing.assert_close(flat.reshape(SHAPE), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_method_says_how_much_memory_it_takes(method):
    assert method.beside(3) >= 1
