import pytest
import torch
from torch import nn

from lfm.hooks import Block, Blocks, NoBlocks, inputs_of, replaced
from tests.operators import small

LLAMA = ("model.layers.{}", ".self_attn", ".o_proj", (".mlp.gate_proj", ".mlp.up_proj"), ".mlp.down_proj")
FOUND = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "olmo2": LLAMA,
    "phi": ("model.layers.{}", ".self_attn", ".dense", (".mlp.fc1",), ".mlp.fc2"),
    "phi3": ("model.layers.{}", ".self_attn", ".o_proj", (".mlp.gate_up_proj",), ".mlp.down_proj"),
    "gpt2": ("transformer.h.{}", ".attn", ".c_proj", (".mlp.c_fc",), ".mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}", ".attention", ".dense", (".mlp.dense_h_to_4h",), ".mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers.{}", ".self_attn", ".out_proj", (".fc1",), ".fc2"),
    "bloom": ("transformer.h.{}", ".self_attention", ".dense", (".mlp.dense_h_to_4h",), ".mlp.dense_4h_to_h"),
    "falcon": ("transformer.h.{}", ".self_attention", ".dense", (".mlp.dense_h_to_4h",), ".mlp.dense_4h_to_h"),
}
IDS = torch.arange(3, 11)[None].repeat(2, 1)


def said(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", FOUND)
def test_the_blocks_of_an_architecture_are_found_by_what_they_do(kind):
    model = small.model(kind).eval()
    blocks = Blocks(model)
    layer, attention, back, into, out = FOUND[kind]
    names = [layer.format(i) for i in range(2)]
    expected = [Block(n, n + attention, n + attention + back, tuple(n + i for i in into), n + out) for n in names]
    assert list(blocks) == expected
    assert (len(blocks), blocks[1]) == (2, expected[1])
    assert blocks.transposed(blocks[0].mlp_out) == (kind == "gpt2")
    assert blocks.weight(blocks[0].mlp_out) is model.get_submodule(blocks[0].mlp_out).weight
    assert blocks.module(blocks[1].attention) is model.get_submodule(blocks[1].attention)
    assert [blocks.layer_of(f"{b.name}.x") for b in blocks] == [0, 1]
    assert blocks.layer_of("lm_head.weight") is None


@pytest.mark.parametrize("kind", FOUND)
def test_what_goes_into_the_last_matrix_of_an_mlp_decides_all_that_it_gives(kind):
    """The keys that are seen, times the weight, are what comes out; put in its place it changes nothing."""
    model = small.model(kind).eval()
    blocks = Blocks(model)
    name = blocks[0].mlp_out
    given = []
    handle = blocks.module(name).register_forward_hook(
        lambda m, a, output: given.append(output.clone())
    )  # Falcon adds to it
    with inputs_of(model, [name, blocks[1].mlp_in[0]]) as seen:
        before = said(model)
    handle.remove()
    assert set(seen) == {name, blocks[1].mlp_in[0]}
    weight = blocks.weight(name) if blocks.transposed(name) else blocks.weight(name).T
    bias = getattr(blocks.module(name), "bias", None)
    by_hand = seen[name] @ weight + (0 if bias is None else bias)
    torch.testing.assert_close(by_hand, given[0])
    with replaced(model, name, lambda output: by_hand):
        torch.testing.assert_close(said(model), before, rtol=1e-4, atol=1e-5)
    with replaced(model, name, torch.zeros_like):
        assert (said(model) - before).abs().max() > 1e-3
    assert torch.equal(said(model), before)


def test_names_with_a_common_beginning_are_of_different_layers():
    blocks = Blocks(small.model("llama", num_hidden_layers=12))
    assert blocks.layer_of("model.layers.1.mlp.up_proj.weight") == 1
    assert blocks.layer_of("model.layers.11.mlp.up_proj.weight") == 11


def test_an_mlp_as_wide_inside_as_outside_ends_with_its_last_matrix():
    found = Blocks(small.model("llama", intermediate_size=16))[0]
    assert (found.mlp_in, found.mlp_out) == (
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        "model.layers.0.mlp.down_proj",
    )


def test_a_module_that_gives_several_things_has_its_first_replaced():
    model = small.model("llama").eval()
    name = Blocks(model)[0].attention
    before = said(model)
    with replaced(model, name, lambda output: output):
        assert torch.equal(said(model), before)
    with replaced(model, name, torch.zeros_like):
        assert not torch.allclose(said(model), before)


def test_hooks_go_also_when_the_block_fails():
    model = small.model("llama")
    name = Blocks(model)[0].mlp_out
    for hooked in (inputs_of(model, [name]), replaced(model, name, torch.zeros_like)):
        with pytest.raises(RuntimeError, match="asked to"), hooked:
            raise RuntimeError("asked to")
    module = model.get_submodule(name)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_a_network_without_blocks_is_refused_by_what_it_lacks():
    with pytest.raises(NoBlocks, match="Sequential: it has no list of layers with attention, expected a transformer"):
        Blocks(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(NoBlocks, match=r"'model\.layers\.0' has no plain MLP, expected two or three matrices"):
        Blocks(small.model("mixtral", num_local_experts=2))
    error = NoBlocks("Net", "it has none", "some")
    assert str(NoBlocks(*error.args)) == str(error)
