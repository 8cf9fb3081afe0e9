"""Which axes belong together: of chains by themselves, of other networks as declared."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from lfm.alignment.base import Axis, GroupError, declared
from lfm.alignment.git_rebasin import GitReBasin
from lfm.errors import UnknownName
from tests.lfm.alignment.networks import SHAPE, STREAM, Residual, made, shuffled

IMAGES = torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(1))


def groups(model):
    return GitReBasin().groups(model)


def moved(model, spec):
    """The same network with its units in another order."""
    tensors = {n: v.clone() for n, v in model.state_dict().items()}
    model.load_state_dict(shuffled(spec, tensors).apply(tensors))
    return model


def test_a_group_is_a_layer_its_norm_and_the_columns_of_the_next():
    found = groups(made("cnn", (6, 7)))
    kinds = ("weight", "bias", "running_mean", "running_var")
    norm = {layer: tuple(Axis(f"layers.{layer}.norm.{kind}", 0) for kind in kinds) for layer in (0, 1)}
    assert found.groups == {
        "layers.0.weights": (Axis("layers.0.weights.weight", 0), Axis("layers.0.weights.bias", 0), *norm[0],
                             Axis("layers.1.weights.weight", 1)),
        "layers.1.weights": (Axis("layers.1.weights.weight", 0), Axis("layers.1.weights.bias", 0), *norm[1],
                             Axis("head.weight", 1, repeats=4)),
    }  # fmt: skip
    assert {"layers.0.norm.running_var", "layers.1.norm.running_mean"} <= found.carried
    assert not {name for name in found.carried if name.endswith(("weight", "bias"))}


class Functions(nn.Module):
    """What modules do, done by functions."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.one(x / 2)), 2)
        x = functional.adaptive_avg_pool2d(torch.tanh(self.two(x)), 1)
        return self.head(torch.flatten(x, 1)).softmax(dim=1)


CHAINS = {
    "functions": Functions,
    "mlp": lambda: made("mlp"),
    "cnn": lambda: made("cnn"),
    "without norms": lambda: made("cnn", batchnorm=False),
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 3)),
    "flattened": lambda: nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.Flatten(), nn.BatchNorm1d(180), nn.SiLU(), nn.Linear(180, 6), nn.Tanh(), nn.Linear(6, 2)
    ),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4), nn.Softmax(dim=1)
    ),
}


@pytest.mark.parametrize("network", CHAINS.values(), ids=CHAINS)
def test_a_chain_computes_the_same_whatever_the_order_of_its_units(network):
    torch.manual_seed(0)
    model = network().eval()
    said, before = model(IMAGES), {n: v.clone() for n, v in model.state_dict().items()}
    torch.testing.assert_close(moved(model, groups(model))(IMAGES), said, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_residual_network_computes_the_same_with_the_groups_that_are_declared_for_it():
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(7, 5)
    said = model(x)
    spec = declared(STREAM, {n: tuple(v.shape) for n, v in model.state_dict().items()})
    assert spec.units({n: tuple(v.shape) for n, v in model.state_dict().items()}) == {"stream": 6, "hidden": 9}
    torch.testing.assert_close(moved(model, spec)(x), said)


def test_a_head_of_attention_is_a_unit_of_several_places():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=12, intermediate_size=10, num_hidden_layers=1, num_attention_heads=3
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    said = model(ids).logits
    at, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    heads = [[f"{at}.{name}_proj.weight", 0, 4] for name in "qkv"]
    wide = [[f"{mlp}.{name}_proj.weight", 0] for name in ("gate", "up")]
    stated = {"heads": [*heads, [f"{at}.o_proj.weight", 1, 4]], "mlp": [*wide, [f"{mlp}.down_proj.weight", 1]]}
    spec = declared(stated, {n: tuple(v.shape) for n, v in model.state_dict().items()})
    torch.testing.assert_close(moved(model, spec)(ids).logits, said)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.other(self.one(x).softmax(dim=-1))


class Twice(Branches):
    def forward(self, x):
        return self.other(self.other(self.one(x)))


class Depends(Branches):
    def forward(self, x):
        return self.other(self.one(x)) if x.sum() > 0 else x


REFUSED = {
    "residual": (Residual, "Residual: what 'enter' gives goes to 2 parts, expected a plain chain of linear maps"),
    "softmax": (Branches, "Branches: 'softmax' stands between 'one' and 'other', expected a plain chain"),
    "twice": (Twice, "Twice: 'other' is used twice"),
    "depends": (Depends, r"Depends: what it computes depends on its input \("),
    "attention": (lambda: nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)), "'1' is of type Multihead"),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), "'1' has groups of channels"),
    "axes": (lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Linear(6, 4)), "'1' follows '0' along another axis"),
    "places": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(15, 4)),
        "'2' takes 15 numbers of the 6 of '0'",
    ),
    "alone": (lambda: nn.Sequential(nn.Linear(4, 4)), "Sequential: it has no hidden units, expected two layers"),
}


@pytest.mark.parametrize(("network", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_chain_is_refused_by_name(network, sentence):
    with pytest.raises(GroupError, match=sentence) as problem:
        groups(network())
    assert str(GroupError(*problem.value.args)) == str(problem.value)


def test_a_language_model_is_refused_by_name_where_nothing_is_declared():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1))
    with pytest.raises(GroupError, match=r"LlamaForCausalLM: 'model.embed_tokens' is of type Embedding, expected"):
        groups(model)


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"g": []}, "groups 'g': it has no axis of a parameter, expected one at least"),
        ({"g": [["mean", 0]]}, "groups 'g': it has no axis of a parameter"),
        ({"g": [["w", 2]]}, r"groups 'g': axis 2 of 'w', expected one of the 2 from 0 on of shape \(6, 4\)"),
        ({"g": [["w", -1]]}, "groups 'g': axis -1 of 'w'"),
        ({"g": [["w", 0, 4]]}, "groups 'g': 4 places of axis 0 of 'w' for each unit, expected a number that divides"),
        ({"g": [["w", 0, 0]]}, "groups 'g': 0 places of axis 0 of 'w'"),
        ({"g": [["w", 0], ["v", 0]]}, "groups 'g': 12 units along axis 0 of 'v', expected 6, as along its first axis"),
        ({"g": [["w", 0]], "h": [["w", 0]]}, "groups 'h': axis 0 of 'w', which 'g' has, expected each axis once"),
        ({"g": [["w", 0], ["w", 0]]}, "groups 'g': axis 0 of 'w', which 'g' has, expected each axis once"),
        ({"g": [["w", 0], ["v", 0, 2], ["v", 0, 5]], "h": [["z", 0]]}, "groups 'g': 5 places of axis 0 of 'v'"),
    ],
)
def test_groups_that_do_not_fit_are_refused_by_name(stated, sentence):
    with pytest.raises(GroupError, match=sentence):
        declared(stated, {"w": (6, 4), "v": (12,), "mean": (6,)}, carried=["mean"])
    with pytest.raises(UnknownName, match="No tensor is called 'z'"):
        declared({"g": [["z", 0]]}, {"w": (6, 4)})


def test_places_of_a_unit_make_its_group_fit():
    spec = declared({"g": [["w", 0], ["v", 0, 2]]}, {"w": (6, 4), "v": (12,)})
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    assert spec.groups["g"][1].permuted(torch.arange(12), order).tolist() == [4, 5, 0, 1, 2, 3, 6, 7, 10, 11, 8, 9]
