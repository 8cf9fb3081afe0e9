import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.merging.linear import Linear

SHAPES = [(), (1,), (7,), (4, 5)]


def slow_mean(experts, weights, *, normalize):
    flat = [e.reshape(-1).tolist() for e in experts]
    out = []
    for i in range(len(flat[0])):
        total = 0.0
        for weight, values in zip(weights, flat, strict=True):
            total += weight * values[i]
        out.append(total / sum(weights) if normalize else total)
    return torch.tensor(out).reshape(experts.shape[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_the_weighted_mean_or_sum_of_the_experts(shape, normalize):
    draw = torch.Generator().manual_seed(0)
    base, experts = torch.randn(shape, generator=draw), torch.randn((3, *shape), generator=draw)
    weights = (0.5, 2.0, -1.0)
    merged = Linear(weights=weights, normalize=normalize).merge("w", base, experts, {})
    torch.testing.assert_close(merged, slow_mean(experts, weights, normalize=normalize))


def test_linear_without_weights_is_the_uniform_mean():
    experts = torch.tensor([[1.0, -2.0], [2.0, 4.0], [6.0, 1.0]])
    torch.testing.assert_close(Linear().merge("w", torch.zeros(2), experts, {}), torch.tensor([3.0, 1.0]))


def test_linear_of_equal_experts_is_that_expert():
    expert = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Linear().merge("w", torch.ones(4, 5), torch.stack([expert] * 7), {}), expert)


def test_linear_leaves_the_base_out():
    experts = torch.tensor([[1.0], [2.0]])
    one, other = (Linear().merge("w", base, experts, {}) for base in (torch.zeros(1), torch.full((1,), 1e9)))
    assert torch.equal(one, other)


def test_linear_leaves_its_inputs_alone():
    base, experts = torch.ones(3), torch.ones(2, 3)
    Linear(weights=(1.0, 3.0)).merge("w", base, experts, {})
    assert torch.equal(base, torch.ones(3))
    assert torch.equal(experts, torch.ones(2, 3))


def test_linear_refuses_weights_that_cancel_and_weights_for_other_experts():
    with pytest.raises(HyperparameterError, match=r"Linear: weights=\(1.0, -1.0\), expected a sum other than 0"):
        Linear(weights=(1.0, -1.0))
    Linear(weights=(1.0, -1.0), normalize=False)
    with pytest.raises(HyperparameterError, match="expected one number for each of the 3 experts"):
        Linear(weights=(1.0, 2.0)).merge("w", torch.zeros(2), torch.zeros(3, 2), {})
