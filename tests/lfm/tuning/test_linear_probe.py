import torch
from torch import nn

from lfm.tuning.linear_probe import LinearProbe


def test_only_the_last_linear_layer_learns_and_the_features_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)})
    model.requires_grad_(False)
    LinearProbe().attach(model, inject=lambda kind, **fields: None)
    before = {n: p.clone() for n, p in model.named_parameters()}
    x, right = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(model["head"](model["norm"](model["trunk"](x))), right).backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {"head.weight", "head.bias"}


def test_nothing_is_added_to_the_model():
    model = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    asked = []
    LinearProbe().attach(model, inject=lambda kind, **fields: asked.append(kind))
    assert asked == []
    assert LinearProbe.gives == "model"
    assert LinearProbe.needs.architecture == "classifier"
