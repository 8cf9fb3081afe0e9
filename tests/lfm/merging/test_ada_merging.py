import math

import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.merging.ada_merging import AdaMerging
from lfm.merging.task_arithmetic import TaskArithmetic

NAMES = ("embed.weight", "h.0.attn.weight", "h.0.attn.bias", "h.1.attn.weight", "head.weight")


def layer_of(name):
    return ".".join(name.split(".")[:2]) if name.startswith("h.") else name.split(".")[0]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 5)])
def test_a_parameter_is_the_base_and_each_delta_as_often_as_its_coefficient_says(shape):
    torch.manual_seed(0)
    base, experts, coefficients = torch.randn(shape), torch.randn(3, *shape), torch.tensor([0.2, -0.5, 1.1])
    expected = base.clone().reshape(-1)
    for k in range(3):
        for i in range(expected.numel()):
            expected[i] += coefficients[k] * (experts[k].reshape(-1)[i] - base.reshape(-1)[i])
    found = AdaMerging().merge("w", base, experts, {"coefficients": coefficients})
    torch.testing.assert_close(found, expected.reshape(shape))
    combined = AdaMerging().combine(base, experts - base, coefficients)
    torch.testing.assert_close(combined, expected.reshape(shape))


def test_before_the_first_step_it_is_task_arithmetic():
    torch.manual_seed(0)
    base, experts = torch.randn(6, 5), torch.randn(4, 6, 5)
    (start,) = AdaMerging().coefficients(AdaMerging().start(4, 1))
    merged = AdaMerging().merge("w", base, experts, {"coefficients": start})
    assert torch.equal(merged, TaskArithmetic(scale=0.3).merge("w", base, experts, {}))


def test_a_coefficient_gets_the_gradient_of_the_parameter_times_its_delta():
    torch.manual_seed(0)
    base, deltas = torch.randn(4, 5), torch.randn(3, 4, 5)
    coefficients = torch.tensor([0.3, 0.1, -0.2], requires_grad=True)
    merged = AdaMerging().combine(base, deltas, coefficients)
    merged.retain_grad()
    (merged**3).sum().backward()
    for k in range(3):
        expected = sum(merged.grad[i, j] * deltas[k, i, j] for i in range(4) for j in range(5))
        torch.testing.assert_close(coefficients.grad[k], expected)


def test_the_objective_is_the_entropy_of_each_row():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.5, -1.0]])
    shares = [math.exp(x) for x in logits[2].tolist()]
    expected = -sum(s / sum(shares) * math.log(s / sum(shares)) for s in shares)
    found = AdaMerging().objective(logits)
    torch.testing.assert_close(found, torch.tensor([math.log(4), 0.0, expected]))
    assert AdaMerging().objective(torch.tensor([[1000.0, -1000.0]])).tolist() == [0.0]


def test_a_task_has_one_coefficient_a_layer_or_a_parameter_has_its_own():
    assert set(AdaMerging(granularity="task").groups(NAMES, layer_of).values()) == {"all"}
    blocks = AdaMerging(granularity="layer").groups(NAMES, layer_of)
    assert list(blocks.values()) == ["embed", "h.0", "h.0", "h.1", "head"]
    assert AdaMerging(convention="fusion_bench").groups(NAMES, layer_of) == {n: n for n in NAMES}
    assert AdaMerging(scale=0.5).start(3, 4).tolist() == [[0.5] * 3] * 4


def test_clamped_coefficients_stay_between_0_and_1():
    learnt = torch.tensor([[-0.1, 0.4, 1.2]])
    assert AdaMerging(clamp=True).coefficients(learnt).tolist() == [[0.0, pytest.approx(0.4), 1.0]]
    assert AdaMerging().coefficients(learnt) is learnt


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("granularity", "row", "task or layer"),
        ("steps", -1, "steps >= 0"),
        ("learning_rate", 0.0, "learning_rate > 0"),
        ("batch_size", 0, "batch_size >= 1"),
        ("convention", "mergekit", "one of paper, fusion_bench"),
    ],
)
def test_fields_out_of_range_are_refused(field, value, allowed):
    with pytest.raises(HyperparameterError, match=f"AdaMerging: {field}={value!r}, expected {allowed}"):
        AdaMerging(**{field: value})
    with pytest.raises(HyperparameterError, match=r"scale=1\.5, expected 0 <= scale <= 1, or clamp false"):
        AdaMerging(scale=1.5, clamp=True)
