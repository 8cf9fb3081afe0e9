"""Prefix tuning."""

import copy

import pytest
import torch
import transformers

from lfm.errors import HyperparameterError
from lfm.hooks import NoBlocks, cache_name
from lfm.tuning.prefix import Prefix
from tests.operators import small

pytestmark = pytest.mark.slow

# Windows that are shorter than the texts below; gpt2 and opt have learnt positions, the others rotary ones.
KINDS = {
    "llama": {},
    "gpt2": {},
    "opt": {},
    "gpt_neox": {"num_key_value_heads": 2},
    "qwen2": {},
    "phi": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
}
LENGTH, LONG = 3, 11


def lively(kind, **changes):
    """A frozen model in which every part matters."""
    made = small.model(kind, **{"tie_word_embeddings": False, **KINDS.get(kind, {}), **changes}).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return made.requires_grad_(False)


def attached(model, hidden=5):
    torch.manual_seed(5)
    method = Prefix(length=LENGTH, hidden=hidden)
    method.attach(model, lambda kind, **fields: None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".prefix." in name:
                parameter.mul_(20 if hidden is None else 2)
    return method


def text(number=LONG, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, small.VOCABULARY, (1, number), generator=draw)


def pairs_of(model):
    return [(k.detach(), v.detach()) for k, v in model.get_decoder().prefix.virtual()]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "qwen2", "phi"])
@torch.no_grad()
def test_it_equals_the_same_cache_given_by_hand(kind):
    """The library's own masks and an explicit cache; the text has its positions from 0."""
    model = lively(kind)
    plain = copy.deepcopy(model)
    attached(model)
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(pairs_of(model)):
        cache.update(keys[None].clone(), values[None].clone(), layer)
    ids = text()
    by_hand = plain(
        input_ids=ids,
        attention_mask=torch.ones(1, LENGTH + LONG, dtype=torch.long),
        position_ids=torch.arange(LONG)[None],
        **{cache_name(plain.get_decoder()): cache},
    ).logits
    torch.testing.assert_close(model(input_ids=ids).logits, by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_hand, plain(input_ids=ids).logits, atol=1e-2)


def attention_by_hand(query, keys, values, prefix_keys, prefix_values, window):
    """One head, one query at a time: softmax over the prefix and the places that it sees."""
    out = []
    for i in range(len(query)):
        seen = [j for j in range(i + 1) if window is None or j > i - window]
        ks = [*prefix_keys, *(keys[j] for j in seen)]
        vs = [*prefix_values, *(values[j] for j in seen)]
        scores = torch.stack([query[i] @ k for k in ks]) / query.shape[-1] ** 0.5
        out.append(sum(w * v for w, v in zip(scores.softmax(0), vs, strict=True)))
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_a_layer_attends_to_the_prefix_and_to_what_its_window_leaves(window):
    model = lively("mistral", sliding_window=window, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    attached(model)
    seen = {}
    layer = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer, name).register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out[0]))
    layer.o_proj.register_forward_pre_hook(lambda m, a: seen.__setitem__("heads", a[0][0]))
    model(input_ids=text())
    cos, sin = model.model.rotary_emb(seen["q_proj"][None], torch.arange(LONG)[None])

    def turned(x):
        half = torch.cat([-x[:, 4:], x[:, :4]], dim=-1)
        return x * cos[0] + half * sin[0]

    ((prefix_keys, prefix_values),) = pairs_of(model)
    keys, values = turned(seen["k_proj"]), seen["v_proj"]
    for head in range(2):  # both share the one pair of keys and values
        query = turned(seen["q_proj"][:, 8 * head : 8 * head + 8])
        wanted = attention_by_hand(query, keys, values, prefix_keys[0], prefix_values[0], window)
        torch.testing.assert_close(seen["heads"][:, 8 * head : 8 * head + 8], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_padded_row_says_what_it_says_alone(kind):
    model = lively(kind)
    attached(model)
    ids, other = text(), text(5, seed=1)
    alone = [model(input_ids=one).logits[0] for one in (ids, other)]
    pad = LONG - 5
    left = torch.cat([ids, torch.cat([torch.zeros(1, pad, dtype=torch.long), other], dim=1)])
    there = torch.ones_like(left)
    there[1, :pad] = 0
    both = model(input_ids=left, attention_mask=there).logits
    torch.testing.assert_close(both[0], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1, pad:], alone[1], rtol=1e-4, atol=1e-4)
    right = torch.cat([ids, torch.cat([other, torch.zeros(1, pad, dtype=torch.long)], dim=1)])
    torch.testing.assert_close(model(input_ids=right).logits[1, :5], alone[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_token_by_token_with_a_cache_is_all_at_once(kind):
    model = lively(kind)
    attached(model)
    ids, name = text(), cache_name(model.get_decoder())
    cache = transformers.DynamicCache(config=model.config)  # the library's own, with windows
    steps = [model(input_ids=ids[:, :4], use_cache=True, **{name: cache}).logits]
    for i in range(4, LONG):
        steps.append(model(input_ids=ids[:, i : i + 1], use_cache=True, **{name: cache}).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_the_librarys_own_generation_reads_the_prefix_too(kind):
    model = lively(kind)
    attached(model)
    model.generation_config.eos_token_id = None
    ids = text(5)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    for _ in range(6):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(said, ids)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_what_is_kept_without_the_mlp_says_the_same(kind):
    model = lively(kind)
    plain = copy.deepcopy(model)
    method = attached(model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    kept = method.export(model, trained)
    method.rewrite(plain)
    added = {n: p for n, p in plain.named_parameters() if ".prefix." in n}
    assert {n: p.shape for n, p in added.items()} == {n: t.shape for n, t in kept.items()}
    for name, parameter in added.items():
        parameter.copy_(kept[name])
    assert torch.equal(plain(input_ids=text()).logits, model(input_ids=text()).logits)


@pytest.mark.parametrize("hidden", [5, None])
def test_only_the_prefix_learns_and_what_is_kept_are_the_values_that_were_given(hidden):
    model = lively("llama")
    method = attached(model, hidden)
    learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".virtual.")[0] for n in learnt} == {"model.prefix"}
    model(input_ids=text()).logits.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == learnt.keys()
    assert all(p.grad.abs().max() > 0 for p in learnt.values())
    zeros = method.export(model, {n: torch.zeros_like(p) for n, p in learnt.items()})
    assert all(not t.any() for t in zeros.values()), "it kept the model's own values"


def test_the_numbers_that_are_kept_are_a_key_and_a_value_of_each_layer_and_head():
    model = lively("llama")
    Prefix(length=7).rewrite(model)
    added = sum(p.numel() for n, p in model.named_parameters() if ".prefix." in n)
    assert added == 7 * 2 * 2 * 1 * 8  # two layers, of which each has one head of width 8 for keys and for values


def test_a_copy_of_a_model_has_a_prefix_of_its_own():
    model = lively("llama")
    attached(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.prefix.virtual.table.add_(1.0)
    assert not torch.allclose(twin(input_ids=text()).logits, model(input_ids=text()).logits)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (lambda: small.model("bloom"), "not told the positions"),
        (lambda: transformers.BertModel(small.config("bert")), "keeps no keys and values"),
        (lambda: small.model("llama4_text", attention_chunk_size=4, num_local_experts=2), "chunked_attention"),
    ],
)
def test_what_keeps_no_cache_or_attends_otherwise_is_refused_by_name(network, said):
    with pytest.raises(NoBlocks, match=said):
        Prefix().rewrite(network())


@pytest.mark.parametrize(("field", "value"), [("length", 0), ("hidden", 0)])
def test_what_is_out_of_range_is_named(field, value):
    with pytest.raises(HyperparameterError, match=f"Prefix: {field}="):
        Prefix(**{field: value})
