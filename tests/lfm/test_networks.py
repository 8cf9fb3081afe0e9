"""Small networks for images."""

import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.networks import ImageNetwork, Network, evaluating, statistics_of

IMAGES = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_it_is_what_its_layers_are_one_after_another(kind):
    torch.manual_seed(1)
    made = ImageNetwork(Network(kind=kind, widths=(4, 5)), (2, 8, 8), 3, mean=(0.5, 0.2), deviation=(0.3, 2.0)).eval()
    x = torch.stack([(IMAGES[:, 0] - 0.5) / 0.3, (IMAGES[:, 1] - 0.2) / 2.0], dim=1)
    x = x.flatten(1) if kind == "mlp" else x
    for layer in made.layers:
        layer.norm.running_mean.uniform_(-1, 1)
        layer.norm.running_var.uniform_(0.5, 2)
        y = layer.weights(x)
        shape = (1, -1, 1, 1) if kind == "cnn" else (1, -1)
        norm = layer.norm
        y = (y - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
        x = (y * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)
        x = torch.nn.functional.max_pool2d(x, 2) if kind == "cnn" else x
    torch.testing.assert_close(made.features(IMAGES), x.flatten(1))
    torch.testing.assert_close(made(IMAGES), x.flatten(1) @ made.head.weight.T + made.head.bias)


def test_four_blocks_halve_an_image_until_a_side_is_one_pixel():
    torch.manual_seed(0)
    assert ImageNetwork(Network(widths=(4,) * 4), (1, 28, 28), 5).head.in_features == 4
    assert ImageNetwork(Network(widths=(4,) * 4), (1, 8, 8), 5).head.in_features == 4
    assert ImageNetwork(Network(widths=(4, 6)), (1, 8, 4), 5).head.in_features == 6 * 2 * 1


def test_what_batch_normalisation_has_seen_moves_in_training_alone():
    torch.manual_seed(0)
    made = ImageNetwork(Network(widths=(4,)), (2, 8, 8), 3)
    seen = statistics_of(made)
    assert sorted(seen) == [f"layers.0.norm.{k}" for k in ("num_batches_tracked", "running_mean", "running_var")]
    before = {name: value.clone() for name, value in seen.items()}
    made.eval()(IMAGES)
    assert all(torch.equal(seen[n], before[n]) for n in seen)
    made.train()(IMAGES)
    assert not any(torch.equal(seen[n], before[n]) for n in seen)
    assert statistics_of(ImageNetwork(Network(batchnorm=False), (2, 8, 8), 3)) == {}


@pytest.mark.parametrize(("field", "value"), [("kind", "rnn"), ("widths", ()), ("widths", (4, 0))])
def test_what_cannot_be_built_is_named(field, value):
    with pytest.raises(HyperparameterError, match=f"Network: {field}="):
        Network(**{field: value})


def test_a_model_evaluates_for_a_while_and_is_then_as_it_was():
    model = ImageNetwork(Network(widths=(4, 4)), (2, 8, 8), 3).train()
    model.layers[0].eval()
    model.head.bias.requires_grad_(False)
    training = [m.training for m in model.modules()]
    asking = [p.requires_grad for p in model.parameters()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()] == asking
