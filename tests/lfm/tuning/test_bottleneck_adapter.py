"""Bottleneck adapters."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn

from lfm.errors import HyperparameterError
from lfm.hooks import Blocks, NoBlocks
from lfm.tuning.bottleneck_adapter import Bottleneck, BottleneckAdapter
from tests.operators import small

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 17, 203, 44, 8, 91]])
DECODERS = ("llama", "qwen3", "gemma2", "phi", "phi3", "gpt2", "gpt_neox", "opt", "bloom")


def attached(model, **fields):
    """A frozen model as the operator hands it over, with adapters that do something."""
    model.requires_grad_(False)
    BottleneckAdapter(width=4, **fields).attach(model, lambda kind, **fields: None)
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def hidden(model):
    return model.eval()(input_ids=IDS).last_hidden_state


def by_hand(vector, adapter, nonlinearity):
    """One place's vector through an adapter, number by number."""
    down, up = adapter.down, adapter.up
    narrow = [nonlinearity(sum(w * x for w, x in zip(row, vector, strict=True)) + b)
              for row, b in zip(down.weight.tolist(), down.bias.tolist(), strict=True)]  # fmt: skip
    return [x + sum(w * n for w, n in zip(row, narrow, strict=True)) + b
            for x, row, b in zip(vector, up.weight.tolist(), up.bias.tolist(), strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    ("named", "nonlinearity"),
    [("gelu", lambda x: x * (1 + math.erf(x / 2**0.5)) / 2), ("relu", lambda x: max(x, 0.0))],
)
def test_an_adapter_adds_what_its_two_matrices_make_of_each_place(named, nonlinearity):
    torch.manual_seed(0)
    adapter = Bottleneck(5, 3, init=0.5, nonlinearity=named)
    nn.init.normal_(adapter.down.bias)
    nn.init.normal_(adapter.up.bias)
    given = torch.randn(2, 3, 5)
    wanted = [[by_hand(place, adapter, nonlinearity) for place in row] for row in given.tolist()]
    torch.testing.assert_close(adapter(given), torch.tensor(wanted))


def test_bert_base_has_as_many_numbers_more_as_the_paper_says():
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
    before = {n for n, _ in bert.named_parameters()}
    BottleneckAdapter(width=64).rewrite(bert)
    added = {n: p.numel() for n, p in bert.named_parameters() if n not in before}
    assert sum(added.values()) == 24 * (2 * 64 * 768 + 64 + 768) == 2_379_264
    assert before <= {n for n, _ in bert.named_parameters()}, "what was there has another name now"


def test_it_starts_near_the_identity_and_a_smaller_start_is_nearer():
    base = small.model("llama")
    wanted = base(IDS).logits
    distances = []
    for init in (1e-2, 1e-3, 1e-4):
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        BottleneckAdapter(width=4, init=init).rewrite(model)
        drawn = torch.cat([m.down.weight.flatten() for m in model.modules() if isinstance(m, Bottleneck)])
        assert 0 < drawn.abs().max() <= 2 * init
        assert float(drawn.detach().std()) == pytest.approx(
            0.88 * init, rel=0.2
        )  # of a normal distribution cut at twice its own
        distances.append(float((model(IDS).logits - wanted).norm() / wanted.norm()))
    assert distances[0] > 20 * distances[1] > 20 * distances[2] > 0
    assert distances[1] < 1e-4


@pytest.mark.parametrize("kind", DECODERS)
def test_adapters_stand_after_the_attention_and_after_the_mlp_of_every_layer(kind):
    """With everything else of the layers at 0, the stream is the embedding plus what each adapter says to 0."""
    model = small.model(kind).eval()
    blocks = Blocks(model)
    trunk = model.get_decoder()
    with torch.no_grad():
        for block in blocks:
            for name in (block.attention_out, block.mlp_out):
                for parameter in blocks.module(name).parameters():
                    parameter.zero_()
    streams = []
    last = blocks.module(blocks[len(blocks) - 1].name)
    last.register_forward_hook(lambda m, a, out: streams.append(out[0] if isinstance(out, tuple) else out))
    trunk(IDS)
    attached(model)
    trunk(IDS)
    added = sum(m(torch.zeros(16)) for m in model.modules() if isinstance(m, Bottleneck))
    assert sum(isinstance(m, Bottleneck) for m in model.modules()) == 4
    if kind == "gemma2":  # a norm follows each part
        assert not torch.allclose(streams[1], streams[0], atol=1e-2)
    else:
        torch.testing.assert_close(streams[1] - streams[0], added.expand_as(streams[0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_encoders_have_them_before_what_a_part_says_is_added_and_normed(kind):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    named = {"dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 2} if kind == "distilbert" else sizes
    torch.manual_seed(0)
    plain = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, vocab_size=300, **named))
    model = attached(copy.deepcopy(plain))
    blocks = Blocks(plain)
    adapters = [m for m in model.modules() if isinstance(m, Bottleneck)]
    names = [n for block in blocks for n in (block.attention_out, block.mlp_out)]
    for name, adapter in zip(names, adapters, strict=True):
        plain.get_submodule(name).register_forward_hook(lambda m, a, out, adapter=adapter: adapter(out))
    torch.testing.assert_close(hidden(model), hidden(plain))
    assert {n.rpartition(".adapter.")[0] for n, p in model.named_parameters() if ".adapter." in n} == set(names)


def test_only_adapters_and_norms_learn_and_without_norms_only_adapters():
    for norms in (True, False):
        model = attached(small.model("llama"), norms=norms)
        learnt = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n in learnt if ".adapter." not in n} == (
            {n for n, _ in model.named_parameters() if "norm" in n} if norms else set()
        )
        model(IDS).logits.sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == learnt


def test_pfeiffers_variant_has_one_in_each_layer_after_the_mlp():
    model = attached(small.model("llama"), convention="pfeiffer")
    places = [n for n, m in model.named_modules() if isinstance(m, Bottleneck)]
    assert places == [f"model.layers.{i}.mlp.down_proj.adapter" for i in (0, 1)]
    assert {m.nonlinearity for m in model.modules() if isinstance(m, Bottleneck)} == {"relu"}


def test_a_copy_of_a_model_uses_its_own_adapters():
    model = attached(small.model("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_submodule("model.layers.0.mlp.down_proj.adapter").up.bias.add_(1.0)
        assert not torch.allclose(twin(IDS).logits, model(IDS).logits)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for again in (False, True):
        model = attached(small.model("llama")).train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_half_precision_model_gets_back_the_dtype_that_it_gave():
    adapter = Bottleneck(4, 2, init=0.1, nonlinearity="gelu")
    assert adapter(torch.ones(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_a_network_without_layers_is_refused_by_name():
    with pytest.raises(NoBlocks, match="Sequential: it has no list of layers with attention"):
        BottleneckAdapter().rewrite(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(("field", "value"), [("width", 0), ("init", 0.0)])
def test_what_is_out_of_range_is_named(field, value):
    with pytest.raises(HyperparameterError, match=f"BottleneckAdapter: {field}="):
        BottleneckAdapter(**{field: value})
