import math

import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.merging import slerp
from lfm.merging.slerp import SLERP

SHAPES = [(), (1,), (7,), (4, 5)]


def merged(t, one, other):
    return SLERP(t=t).merge("w", torch.zeros_like(one), torch.stack([one, other]), {})


def slow_slerp(one, other, t):
    a, b = one.reshape(-1).tolist(), other.reshape(-1).tolist()
    lengths = [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (lengths[0] * lengths[1])
    if abs(cosine) > 0.9995:
        shares = 1 - t, t
    else:
        angle = math.acos(cosine)
        shares = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return torch.tensor([shares[0] * x + shares[1] * y for x, y in zip(a, b, strict=True)]).reshape(one.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_agrees_with_a_slow_version(shape, t):
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    torch.testing.assert_close(merged(t, one, other), slow_slerp(one, other, t))


@pytest.mark.parametrize(
    ("t", "other", "golden"),
    [  # from [1, 2, 3, -4], computed with mergekit 0.1.5
        (0.25, [3.0, -1.0, 2.0, 0.5], [1.8710184, 1.3931806, 3.264199, -3.2896876]),
        (0.7, [3.0, -1.0, 2.0, 0.5], [2.8751988, -0.0264725, 2.8487263, -1.1849557]),
        (0.25, [1.0, 2.01, 3.0, -4.0], [1.0, 2.0025001, 3.0, -4.0]),
        (0.7, [-2.0, -4.0, -6.0, 8.0], [-1.0999999, -2.1999998, -3.2999997, 4.3999996]),
        (0.25, [0.0, 0.0, 0.0, 0.0], [0.9238795, 1.847759, 2.7716386, -3.695518]),
    ],
    ids=["near", "far", "parallel", "opposite", "zero"],
)
def test_slerp_gives_the_golden_values_of_mergekit(t, other, golden):
    value = merged(t, torch.tensor([1.0, 2.0, 3.0, -4.0]), torch.tensor(other))
    torch.testing.assert_close(value, torch.tensor(golden))


def test_slerp_begins_at_the_first_expert_and_ends_at_the_second():
    draw = torch.Generator().manual_seed(1)
    one, other = torch.randn(4, 5, generator=draw), torch.randn(4, 5, generator=draw)
    assert torch.equal(merged(0.0, one, other), one)
    torch.testing.assert_close(merged(1.0, one, other), other)


def test_slerp_keeps_the_length_of_two_vectors_of_one_length():
    draw = torch.Generator().manual_seed(2)
    one, other = (v / v.norm() for v in torch.randn(2, 9, generator=draw))
    for t in (0.1, 0.5, 0.8):
        assert float(merged(t, one, other).norm()) == pytest.approx(1.0)


def test_slerp_walks_the_same_arc_from_both_ends():
    draw = torch.Generator().manual_seed(3)
    one, other = torch.randn(2, 9, generator=draw)
    torch.testing.assert_close(merged(0.3, one, other), merged(0.7, other, one))


def test_slerp_adds_up_in_blocks_what_it_adds_up_at_once(monkeypatch):
    draw = torch.Generator().manual_seed(4)
    one, other = torch.randn(2, 1000, generator=draw)
    whole = merged(0.4, one, other)
    monkeypatch.setattr(slerp, "BLOCK", 7)
    torch.testing.assert_close(merged(0.4, one, other), whole)


def test_slerp_leaves_its_inputs_and_the_base_alone():
    experts, base = torch.eye(2), torch.full((2,), math.nan)
    value = SLERP(t=0.5).merge("w", base, experts, {})
    torch.testing.assert_close(value, torch.full((2,), math.sqrt(0.5)))
    assert torch.equal(experts, torch.eye(2))


def test_slerp_refuses_a_place_that_is_not_between_the_two():
    with pytest.raises(HyperparameterError, match=r"SLERP: t=1.5, expected 0 <= t <= 1"):
        SLERP(t=1.5)
    assert SLERP.needs.models == (2, 2)
