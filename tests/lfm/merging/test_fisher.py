import math

import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.merging.fisher import FisherMerging, root, squares

SHAPES = [(), (1,), (7,), (4, 5)]
# What fusion_bench 0.2.33's merging_with_fisher_weights gives for these two models and Fisher diagonals.
EXPERTS = {"a": [[1.0, -2.0, 3.0], [2.0, 1.0, -1.0]], "b": [[[0.5, 4.0]], [[-0.5, 2.0]]]}
FISHERS = {"a": [[0.4, 0.0, 0.01], [0.1, 0.0, 0.05]], "b": [[[2e-6, 0.3]], [[1e-7, 0.02]]]}
FUSION_BENCH = {
    (True, None): {"a": [1.5239873, 0.4447637, -0.8261909], "b": [[-0.1175136, 3.5461278]]},
    (True, (1.0, 3.0)): {"a": [1.7675691, 0.7888709, -0.9403353], "b": [[-0.3288672, 3.0634551]]},
    (False, None): {"a": [1.2000011, -0.5, -0.3332889], "b": [[0.2317073, 3.8749945]]},
    (False, (1.0, 3.0)): {"a": [1.4285734, 0.25, -0.7499813], "b": [[-0.0238095, 3.6666539]]},
}


def merge_model(method, experts, fishers):
    """All parameters, as an engine merges them."""
    stacks = {n: torch.tensor(e) for n, e in experts.items()}
    known = {n: {"fisher": torch.tensor(f)} for n, f in fishers.items()}
    found = {}
    for _ in range(method.passes):
        parts = [method.scan(n, stacks[n][0], stacks[n], known.get(n, {})) for n in experts]
        found |= method.settle(sum(p for p in parts if p is not None), found)
    return {n: method.merge(n, torch.zeros_like(s[0]), s, {**found, **known.get(n, {})}) for n, s in stacks.items()}


def slow(experts, fishers, *, convention, normalize, weights, floor):
    """The three dialects, number by number."""
    count = len(next(iter(experts.values())))
    flat = {n: torch.tensor(f).reshape(count, -1).tolist() for n, f in fishers.items()}
    norms = [math.sqrt(sum(v * v for f in flat.values() for v in f[k])) for k in range(count)]
    merged = {}
    for n, values in experts.items():
        stack = torch.tensor(values)
        out = []
        for i in range(stack[0].numel()):
            above = below = 0.0
            for k in range(count):
                value, fisher = stack[k].reshape(-1)[i].item(), flat[n][k][i]
                norm = norms[k] if normalize else 1.0
                if convention == "fusion_bench":
                    fisher, norm = fisher + floor, norm + (floor if normalize else 0.0)
                elif convention == "paper" or k == 0:
                    fisher = max(fisher, floor)
                above += weights[k] / norm * fisher * value
                below += weights[k] / norm * fisher
            out.append(above / below)
        merged[n] = torch.tensor(out).reshape(stack[0].shape)
    return merged


@pytest.mark.parametrize("convention", ["paper", "release", "fusion_bench"])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_what_going_through_the_numbers_gives(convention, normalize):
    method = FisherMerging(convention=convention, normalize=normalize, weights=(1.0, 3.0), floor=1e-3)
    got = merge_model(method, EXPERTS, FISHERS)
    wanted = slow(EXPERTS, FISHERS, convention=convention, normalize=normalize, weights=(1.0, 3.0), floor=1e-3)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize(("settings", "wanted"), FUSION_BENCH.items())
def test_its_convention_gives_what_fusion_bench_does(settings, wanted):
    normalize, weights = settings
    got = merge_model(FisherMerging(convention="fusion_bench", normalize=normalize, weights=weights), EXPERTS, FISHERS)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], torch.tensor(value))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_information_gives_the_mean_and_equal_experts_themselves(shape, normalize):
    experts, fisher = torch.randn(3, *shape), torch.rand(shape) + 0.01
    method = FisherMerging(normalize=normalize)
    found = {"fisher": torch.stack([fisher] * 3)}
    norms = method.settle(method.scan("w", experts[0], experts, found), {}) if normalize else {}
    torch.testing.assert_close(method.merge("w", experts[0], experts, {**found, **norms}), experts.mean(0))
    same = torch.stack([experts[0]] * 3)
    other = {"fisher": torch.rand(3, *shape)}
    norms = method.settle(method.scan("w", same[0], same, other), {}) if normalize else {}
    assert torch.equal(method.merge("w", torch.randn(shape), same, {**other, **norms}), experts[0])


def test_two_gaussian_posteriors_are_merged_into_the_likeliest_weights_of_their_product():
    means, precisions = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[4.0, 0.25], [1.0, 2.0]])
    merged = FisherMerging(normalize=False).merge("w", torch.zeros(2), means, {"fisher": precisions})

    def log_density(w):
        return sum(-0.5 * p * (w[i] - m) ** 2 for ms, ps in zip(means, precisions, strict=True) for i, (m, p) in
                   enumerate(zip(ms.tolist(), ps.tolist(), strict=True)))  # fmt: skip

    best = log_density(merged.tolist())
    for i, step in ((0, 1e-3), (0, -1e-3), (1, 1e-3), (1, -1e-3)):
        moved = merged.tolist()
        moved[i] += step
        assert log_density(moved) < best


def test_what_has_no_information_is_averaged_and_so_is_what_nobody_measured():
    experts = {"w": [[2.0], [4.0]], "running_mean": [[1.0], [2.0]]}
    got = merge_model(FisherMerging(weights=(1.0, 3.0), normalize=False), experts, {"w": [[0.0], [0.0]]})
    assert got["w"].item() == pytest.approx(3.5)
    assert got["running_mean"].item() == pytest.approx(1.75)
    got = merge_model(FisherMerging(convention="release", normalize=False), experts, {"w": [[0.0], [0.0]]})
    assert got["w"].item() == pytest.approx(2.0), "the first one wins"


def test_norms_are_exact_in_any_order_and_over_the_whole_range_of_float32():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(10_000, generator=draw) * 10.0 ** torch.randint(-38, 18, (10_000,), generator=draw).float()
    values = torch.cat([values, torch.tensor([0.0, 1e-45, -3e38, 1.1754944e-38])])
    wanted = math.sqrt(math.fsum(v * v for v in values.double().tolist()))
    assert root(squares(values)[None]).item() == pytest.approx(wanted, rel=1e-14)
    order = torch.randperm(len(values), generator=draw)
    parts = [squares(part) for part in values[order].split(777)]
    assert torch.equal(sum(parts), squares(values))
    assert root(squares(values[-3:-2])[None]).item() == pytest.approx(1e-45, rel=0.5)


def test_fields_out_of_range_are_refused():
    for fields in ({"floor": 0.0}, {"weights": (0.0, 0.0)}, {"weights": (-1.0, 2.0)}, {"convention": "mergekit"}):
        with pytest.raises(HyperparameterError, match=next(iter(fields))):
            FisherMerging(**fields)
    with pytest.raises(HyperparameterError, match="one number for each of the 3 experts"):
        FisherMerging(weights=(1.0, 2.0)).check(3)
