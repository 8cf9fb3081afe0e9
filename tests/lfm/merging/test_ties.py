import math

import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.merging.base import survey
from lfm.merging.ties import TIES, histogram, locate

SHAPES = [(), (1,), (7,), (4, 5)]
CONVENTIONS = ["paper", "mergekit", "peft", "fusion_bench"]

TOY = torch.tensor([[3.0, 1.0, -2.0, 0.1], [-5.0, 0.4, -2.5, 0.2]])


def merge_model(method, base, experts):
    """All parameters, as an engine merges them."""

    def read(name):
        return base[name], torch.stack([e[name] for e in experts])

    found = survey(method, base, read)
    return {name: method.merge(name, *read(name), found) for name in base}


def slow_trim(values, kept, *, ties):
    """Zero all but the `kept` largest of a list; with `ties` also keep what is as large as the smallest of them."""
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    chosen = set(order[:kept])
    if ties and kept:
        limit = abs(values[order[kept - 1]])
        chosen |= {i for i in order if abs(values[i]) >= limit}
    return [v if i in chosen else 0.0 for i, v in enumerate(values)]


def slow_ties(base, experts, *, density, scale, convention, weights):
    """The four dialects on models of flat lists of floats."""
    whole = convention in ("paper", "fusion_bench")
    trimmed = []
    for expert in experts:
        deltas = {n: [e - b for e, b in zip(expert[n], base[n], strict=True)] for n in base}
        kept = {
            "paper": lambda n: max(1, round(density * n)),
            "mergekit": lambda n: max(1, int(density * n)),
            "peft": lambda n: int(density * n),
            "fusion_bench": lambda n: max(1, int(density * n)),
        }[convention]
        if whole:
            flat = [v for n in base for v in deltas[n]]
            flat = slow_trim(flat, kept(len(flat)), ties=True)
            for n in base:
                deltas[n], flat = flat[: len(base[n])], flat[len(base[n]) :]
        elif density < 1:
            deltas = {n: slow_trim(d, kept(len(d)), ties=False) for n, d in deltas.items()}
        trimmed.append(deltas)
    signs = {}
    for n in base:
        for i in range(len(base[n])):
            each = weights if convention == "mergekit" else [1.0] * len(experts)
            mass = sum(w * t[n][i] for w, t in zip(each, trimmed, strict=True))
            signs[n, i] = (mass > 0) - (mass < 0)
    majority = 1 if sum(signs.values()) > 0 else -1
    draw = {"paper": 0, "mergekit": 1, "peft": 1, "fusion_bench": majority}[convention]
    merged = {n: list(base[n]) for n in base}
    for (n, i), sign in signs.items():
        total, count, weight = 0.0, 0, 0.0
        for w, t in zip(weights, trimmed, strict=True):
            vote = w * t[n][i] if convention == "mergekit" else t[n][i]
            if vote * (sign or draw) > 0:
                total, count, weight = total + w * t[n][i], count + 1, weight + w
        divisor = {"paper": count, "mergekit": weight, "peft": count, "fusion_bench": 1}[convention]
        merged[n][i] += scale * total / (divisor or 1)
    return merged


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.77, 1.0])
def test_ties_agrees_with_a_slow_version_on_a_model_of_all_shapes(convention, density):
    draw = torch.Generator().manual_seed(3)
    base = {str(s): torch.randn(s, generator=draw) for s in SHAPES}
    experts = [{n: b + torch.randn(b.shape, generator=draw) for n, b in base.items()} for _ in range(3)]
    weighs = convention in ("mergekit", "peft")
    weights = (0.5, 1.5, 1.0) if weighs else (1.0, 1.0, 1.0)
    method = TIES(density=density, scale=0.7, convention=convention, weights=weights if weighs else None)
    merged = merge_model(method, base, experts)

    def flat(model):
        return {n: v.reshape(-1).tolist() for n, v in model.items()}

    # Differences are taken in float32 first, so that both see the same magnitudes.
    zero = {n: [0.0] * b.numel() for n, b in base.items()}
    deltas = [flat({n: e[n] - base[n] for n in base}) for e in experts]
    slow = slow_ties(zero, deltas, density=density, scale=0.7, convention=convention, weights=weights)
    for name, value in merged.items():
        torch.testing.assert_close(value, base[name] + torch.tensor(slow[name]).reshape(base[name].shape))


@pytest.mark.parametrize(
    ("method", "golden"),
    [
        (TIES(density=0.5), [-5.0, 0.0, -2.25, 0.0]),
        (TIES(density=0.5, convention="mergekit", weights=(1.0, 0.5)), [3.0, 0.0, -3.25 / 1.5, 0.0]),
        (TIES(density=0.5, convention="peft", weights=(1.0, 0.5)), [-2.5, 0.0, -1.625, 0.0]),
        (TIES(density=0.5, convention="fusion_bench", scale=0.3), [-1.5, 0.0, -1.35, 0.0]),
    ],
    ids=CONVENTIONS,
)
def test_ties_gives_the_golden_values_of_each_convention(method, golden):
    merged = merge_model(method, {"w": torch.zeros(4)}, [{"w": d} for d in TOY])
    torch.testing.assert_close(merged["w"], torch.tensor(golden))


@pytest.mark.parametrize("shape", SHAPES)
def test_ties_of_one_expert_at_density_one_is_that_expert(shape):
    draw = torch.Generator().manual_seed(5)
    base, expert = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    merged = merge_model(TIES(density=1.0), {"w": base}, [{"w": expert}])
    torch.testing.assert_close(merged["w"], expert)


def test_ties_trims_the_whole_model_and_not_each_parameter():
    base = {"large": torch.zeros(4), "small": torch.zeros(4)}
    expert = {"large": torch.tensor([8.0, 7.0, 6.0, 5.0]), "small": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    whole = merge_model(TIES(density=0.5), base, [expert])
    assert whole["large"].tolist() == [8.0, 7.0, 6.0, 5.0]
    assert whole["small"].tolist() == [0.0, 0.0, 0.0, 0.0]
    each = merge_model(TIES(density=0.5, convention="peft"), base, [expert])
    assert each["large"].tolist() == [8.0, 7.0, 0.0, 0.0]
    assert each["small"].tolist() == [4.0, 3.0, 0.0, 0.0]


def test_ties_trims_every_expert_at_a_threshold_of_its_own():
    experts = [{"w": torch.tensor([100.0, 50.0, 1.0, 1.0])}, {"w": torch.tensor([0.01, 0.02, 0.04, 0.08])}]
    merged = merge_model(TIES(density=0.5), {"w": torch.zeros(4)}, experts)
    torch.testing.assert_close(merged["w"], torch.tensor([100.0, 50.0, 0.04, 0.08]))


def test_ties_keeps_the_base_value_where_signs_cancel():
    merged = merge_model(
        TIES(density=1.0), {"w": torch.ones(2)}, [{"w": torch.tensor([3.0, 2.0])}, {"w": torch.tensor([-1.0, 2.0])}]
    )
    assert merged["w"].tolist() == [1.0, 2.0]


def test_ties_of_fusion_bench_gives_a_draw_the_sign_of_most_positions_of_the_whole_model():
    base = {"drawn": torch.zeros(1), "rest": torch.zeros(2)}
    one = {"drawn": torch.tensor([2.0]), "rest": torch.tensor([-1.0, -1.0])}
    other = {"drawn": torch.tensor([-2.0]), "rest": torch.tensor([-1.0, 0.5])}
    merged = merge_model(TIES(density=1.0, convention="fusion_bench"), base, [one, other])
    assert merged["drawn"].tolist() == [-2.0]
    assert merged["rest"].tolist() == [-2.0, -1.0]


def test_ties_keeps_all_values_as_large_as_the_smallest_that_survives():
    merged = merge_model(TIES(density=0.25), {"w": torch.zeros(4)}, [{"w": torch.tensor([2.0, -2.0, 2.0, 1.0])}])
    assert merged["w"].tolist() == [2.0, -2.0, 2.0, 0.0]


def test_ties_keeps_at_least_one_value_but_peft_may_keep_none():
    base, expert = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, 3.0, 2.0])}
    for convention in ("paper", "mergekit", "fusion_bench"):
        assert merge_model(TIES(density=0.1, convention=convention), base, [expert])["w"].tolist() == [0.0, 3.0, 0.0]
    assert merge_model(TIES(density=0.1, convention="peft"), base, [expert])["w"].tolist() == [0.0, 0.0, 0.0]


def values_of_every_kind(kind, draw):
    """Two parameters of one expert: what makes an exact selection hard."""
    if kind == "ties":
        return [
            torch.randint(-3, 4, (50,), generator=draw).float(),
            torch.randint(-3, 4, (4, 5), generator=draw).float(),
        ]
    if kind == "zeros":
        sparse = torch.zeros(64)
        sparse[5], sparse[40] = 1.0, -2.0
        return [sparse, torch.zeros(3, 3)]
    if kind == "denormals":
        return [torch.arange(-30, 30).float() * 1e-45, torch.arange(9).float() * 1e-44]
    if kind == "neighbours":  # equal in their high halves, so the second pass decides
        return [(torch.arange(100, dtype=torch.int32) + 0x3F800000).view(torch.float32), torch.full((4,), 1.0)]
    return [
        torch.randn(300, generator=draw) * 10.0 ** torch.randint(-30, 30, (300,), generator=draw),
        torch.randn(7, 9),
    ]


@pytest.mark.parametrize("kind", ["ties", "zeros", "denormals", "neighbours", "spread"])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.33, 0.5, 0.9, 0.999])
def test_ties_finds_the_exact_threshold_that_sorting_finds(kind, density):
    draw = torch.Generator().manual_seed(7)
    experts = [dict(zip("ab", values_of_every_kind(kind, draw), strict=True)) for _ in range(2)]
    base = {n: torch.zeros_like(v) for n, v in experts[0].items()}
    method = TIES(density=density)
    found = survey(method, base, lambda n: (base[n], torch.stack([e[n] for e in experts])))
    for expert, threshold in zip(experts, found["threshold"].tolist(), strict=True):
        magnitudes = sorted((abs(v) for p in expert.values() for v in p.reshape(-1).tolist()), reverse=True)
        assert threshold == magnitudes[max(1, round(density * len(magnitudes))) - 1]


def test_ties_finds_the_same_whatever_the_order_of_parameters():
    draw = torch.Generator().manual_seed(9)
    base = {n: torch.randn(50, generator=draw) for n in "abc"}
    expert = {n: torch.randn(50, generator=draw) for n in "abc"}

    def read(name):
        return base[name], expert[name][None]

    one, other = (survey(TIES(), names, read)["threshold"] for names in ("abc", "cab"))
    assert torch.equal(one, other)


def test_histogram_and_locate_select_within_a_bin():
    values = torch.tensor([1.0, math.nextafter(1.0, 2.0), -4.0, 0.0])
    counts = histogram(values, None)[None]
    assert int(counts.sum()) == 4
    bins, ranks = locate(counts, torch.tensor([2]))
    assert bins.tolist() == [0x3F80]
    assert ranks.tolist() == [1]  # one value lies above the bin


def test_ties_leaves_its_inputs_alone():
    base, experts = torch.zeros(4), TOY.clone()
    for convention in CONVENTIONS:
        merge_model(TIES(density=0.5, convention=convention), {"w": base}, [{"w": e} for e in experts])
    assert torch.equal(base, torch.zeros(4))
    assert torch.equal(experts, TOY)


def test_ties_says_how_many_passes_it_needs():
    assert TIES().passes == 2
    assert TIES(density=1.0).passes == 0
    assert TIES(convention="fusion_bench").passes == 3
    assert TIES(convention="fusion_bench", density=1.0).passes == 1
    assert TIES(convention="mergekit").passes == TIES(convention="peft").passes == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"density": 1.5}, "TIES: density=1.5, expected 0 < density <= 1."),
        ({"density": 0.0}, "TIES: density=0.0, expected 0 < density <= 1."),
        ({"convention": "other"}, "TIES: convention='other', expected one of paper, mergekit, peft, fusion_bench."),
        ({"weights": (1.0,)}, "TIES: weights=(1.0,), expected none, or convention 'mergekit' or 'peft'."),
    ],
)
def test_ties_refuses_a_field_outside_its_range(fields, sentence):
    with pytest.raises(HyperparameterError) as raised:
        TIES(**fields)
    assert str(raised.value) == sentence


def test_ties_merges_a_parameter_without_values():
    for convention in CONVENTIONS:
        base = {"empty": torch.zeros(0, 3), "w": torch.zeros(2)}
        merged = merge_model(TIES(convention=convention), base, [{"empty": torch.zeros(0, 3), "w": torch.ones(2)}])
        assert merged["empty"].shape == (0, 3)
