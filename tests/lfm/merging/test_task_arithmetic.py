import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.merging.task_arithmetic import TaskArithmetic

SHAPES = [(), (1,), (7,), (4, 5)]


def slow_sum(base, experts, scales):
    out = []
    for i, start in enumerate(base.reshape(-1).tolist()):
        value = start
        for scale, expert in zip(scales, experts, strict=True):
            value += scale * (expert.reshape(-1).tolist()[i] - start)
        out.append(value)
    return torch.tensor(out).reshape(base.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scale", "each"), [(0.4, (0.4, 0.4, 0.4)), ((1.0, -0.5, 0.25), (1.0, -0.5, 0.25))])
def test_task_arithmetic_adds_the_scaled_task_vectors_to_the_base(shape, scale, each):
    draw = torch.Generator().manual_seed(0)
    base, experts = torch.randn(shape, generator=draw), torch.randn((3, *shape), generator=draw)
    merged = TaskArithmetic(scale=scale).merge("w", base, experts, {})
    torch.testing.assert_close(merged, slow_sum(base, experts, each))


def test_task_arithmetic_of_one_expert_at_scale_one_is_that_expert():
    draw = torch.Generator().manual_seed(1)
    base, expert = torch.randn(4, 5, generator=draw), torch.randn(4, 5, generator=draw)
    torch.testing.assert_close(TaskArithmetic(scale=1.0).merge("w", base, expert[None], {}), expert)


def test_task_arithmetic_that_forgets_what_it_added_gives_the_base():
    base, expert = torch.tensor([1.0, 2.0]), torch.tensor([4.0, -1.0])
    merged = TaskArithmetic(scale=(1.0, -1.0)).merge("w", base, torch.stack([expert, expert]), {})
    assert torch.equal(merged, base)


def test_task_arithmetic_leaves_its_inputs_alone():
    base, experts = torch.ones(3), torch.full((2, 3), 2.0)
    TaskArithmetic().merge("w", base, experts, {})
    assert torch.equal(base, torch.ones(3))
    assert torch.equal(experts, torch.full((2, 3), 2.0))


def test_task_arithmetic_refuses_scales_for_other_experts():
    with pytest.raises(HyperparameterError, match=r"scale=\(1.0, 2.0\), expected one number for each of the 1 experts"):
        TaskArithmetic(scale=(1.0, 2.0)).merge("w", torch.zeros(2), torch.zeros(1, 2), {})
