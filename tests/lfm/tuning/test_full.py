"""Full fine-tuning."""

from torch import nn

from lfm.tuning.full import Full


def test_every_parameter_learns_and_nothing_is_added():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(2, 4)).requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    Full().attach(model, inject=lambda kind, **fields: before.clear())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before.keys()
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


def test_the_result_is_a_model():
    assert Full.gives == "model"
