"""The weight-ensembling mixture of experts."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn

from lfm.ensembling.wemoe import Router, WEMoE
from lfm.errors import HyperparameterError
from lfm.hooks import Blocks, NoBlocks, cache_name
from lfm.merging.task_arithmetic import TaskArithmetic
from tests.lfm.ensembling.test_family import built, disturbed, experts_of
from tests.operators import small

pytestmark = pytest.mark.slow

KINDS = ("llama", "gpt2", "gpt_neox", "bert")
IDS = torch.tensor([[5, 17, 203, 44, 8, 91], [1, 2, 3, 4, 5, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def model(kind):
    if kind != "bert":
        return small.model(kind).eval()
    torch.manual_seed(0)
    made = transformers.AutoModelForSequenceClassification.from_config(small.config("bert", num_labels=3))
    return experts_of(made, size=0.1)[0].eval()  # its own weights are too small to matter


@torch.no_grad()
def logits(network, ids=IDS, mask=MASK):
    return network(input_ids=ids, attention_mask=mask).logits


@torch.no_grad()
def merged(base, experts, scale):
    found = copy.deepcopy(base)
    for name, value in base.named_parameters():
        stack = torch.stack([e.get_parameter(name) for e in experts])
        found.get_parameter(name).copy_(TaskArithmetic(scale=scale).merge(name, value, stack, {}))
    return found


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_before_it_learns_it_is_task_arithmetic(kind, layers):
    base = model(kind)
    experts = experts_of(base, size=0.1)
    found, _ = built(WEMoE(layers=layers, scale=0.4), base, experts, causal=kind != "bert")
    wanted = logits(merged(base, experts, 0.4))
    torch.testing.assert_close(logits(found), wanted, rtol=1e-5, atol=2e-6)
    assert not torch.allclose(logits(base), wanted, atol=1e-2)


def shares_by_hand(router, hidden, mask, causal):
    """What a router says of every place, number by number."""

    def of(place):
        if router.layers == 2:
            place = [
                max(0.0, sum(w * x for w, x in zip(row, place, strict=True)) + b)
                for row, b in zip(router.inner_weight.tolist(), router.inner_bias.tolist(), strict=True)
            ]
        rows = router.weight.tolist() if router.layers else [[0.0] * len(place)] * len(router.bias)
        pairs = zip(rows, router.bias.tolist(), strict=True)
        return [sum(w * x for w, x in zip(row, place, strict=True)) + b for row, b in pairs]

    found = [[of(place) for place in text] for text in hidden.tolist()]
    if causal:
        return torch.tensor(found)
    for text, seen in zip(found, mask.tolist(), strict=True):
        kept = [place for place, there in zip(text, seen, strict=True) if there]
        text[:] = [[sum(column) / len(kept) for column in zip(*kept, strict=True)]] * len(text)
    return torch.tensor(found)


def by_hand(found, base, experts, mask, causal):
    """The base merged outside of its MLPs, in which every place has weights of its own, made whole one by one."""
    oracle = merged(base, experts, 0.3)
    ours, theirs = Blocks(oracle), [Blocks(e) for e in experts]
    for block in ours:
        router = found.get_submodule(f"{block.mlp_in[0]}.router")
        said = []
        for name in (*block.mlp_in, block.mlp_out):

            def dense(matrix, arguments, output, name=name, router=router, said=said, first=name == block.mlp_in[0]):
                (x,) = arguments
                if first:
                    said[:] = [shares_by_hand(router, x.view(*mask.shape, -1), mask, causal)]
                places, shares = x.reshape(-1, x.shape[-1]), said[0].reshape(-1, len(experts))
                whole = []
                for place, share in zip(places, shares, strict=True):
                    own = {n: p.clone() for n, p in base.get_submodule(name).named_parameters()}
                    for k, blocks in enumerate(theirs):
                        for n, p in blocks.module(name).named_parameters():
                            own[n] += share[k] * (p - base.get_submodule(name).get_parameter(n))
                    weight = own["weight"].T if ours.transposed(name) else own["weight"]
                    whole.append(weight @ place + own.get("bias", 0.0))
                return torch.stack(whole).view_as(output)

            ours.module(name).register_forward_hook(dense)
    return logits(oracle, mask=mask)


@pytest.mark.parametrize(("kind", "layers"), [("llama", 2), ("gpt2", 1), ("gpt_neox", 2), ("bert", 2), ("bert", 0)])
def test_every_text_or_token_has_the_mlps_that_its_router_says(kind, layers):
    base = model(kind)
    experts = experts_of(base, size=0.1)
    causal = kind != "bert"
    found, rooms = built(WEMoE(layers=layers), base, experts, causal=causal)
    before = logits(found)
    disturbed(found, base, rooms)
    with torch.no_grad():
        wanted = by_hand(found, base, experts, MASK, causal)
    seen = MASK.bool() if causal else ...  # what a decoder says of padding is nobody's business
    torch.testing.assert_close(logits(found)[seen], wanted[seen], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, before, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt"])
def test_a_decoder_reads_token_by_token_what_it_reads_at_once(kind):
    base = model(kind)
    found, rooms = built(WEMoE(), base, experts_of(base, size=0.1), causal=True)
    disturbed(found, base, rooms)
    whole = logits(found, mask=torch.ones_like(IDS))
    cache, steps = {cache_name(found): transformers.DynamicCache(config=found.config)}, []
    with torch.no_grad():
        for i in range(IDS.shape[1]):
            steps.append(found(input_ids=IDS[:, i : i + 1], use_cache=True, **cache).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_the_objective_is_the_entropy_of_each_row():
    told = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.5, -1.0]])
    shares = [math.exp(x) for x in told[1].tolist()]
    expected = -sum(s / sum(shares) * math.log(s / sum(shares)) for s in shares)
    torch.testing.assert_close(WEMoE().objective(told), torch.tensor([math.log(4), expected]))


def test_an_untrained_router_says_exactly_the_scale_and_its_last_matrix_learns():
    for layers in (0, 1, 2):
        router = Router(6, 3, scale=0.3, layers=layers, causal=True)
        assert torch.equal(router(torch.randn(4, 6)), torch.full((4, 3), 0.3))
        router(torch.randn(4, 6)).square().sum().backward()
        learns = router.weight if layers else router.bias
        assert learns.grad.abs().sum() > 0


def test_a_network_without_plain_mlps_is_refused():
    with pytest.raises(NoBlocks, match="Sequential: it has no list of layers with attention"):
        WEMoE().build(nn.Sequential(nn.Linear(2, 2)), 2, causal=False)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("layers", 3, "0, 1 or 2"),
        ("steps", -1, "steps >= 0"),
        ("learning_rate", 0.0, "learning_rate > 0"),
        ("batch_size", 0, "batch_size >= 1"),
    ],
)
def test_fields_out_of_range_are_refused(field, value, allowed):
    with pytest.raises(HyperparameterError, match=f"WEMoE: {field}={value!r}, expected {allowed}"):
        WEMoE(**{field: value})
