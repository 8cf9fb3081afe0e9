"""Batch normalisation that sees all rows anew."""

import pytest
import torch
from torch import nn

from lfm.networks import ImageNetwork, Network
from lfm.recalibration import recalibrate

IMAGES = torch.rand(11, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def asked(model, images=IMAGES, batch_size=11):
    return lambda: [model(batch) for batch in images.split(batch_size)]


def network(kind="cnn"):
    torch.manual_seed(0)
    return ImageNetwork(Network(kind=kind, widths=(4, 5, 3)), (2, 8, 8), 3)


def norms(model):
    return [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_each_layer_has_the_mean_and_variance_of_what_it_gets_in_evaluation(kind):
    model = network(kind)
    assert recalibrate(model, asked(model)) == 3
    seen = {}
    for layer in norms(model):
        layer.register_forward_pre_hook(lambda layer, given: seen.update({layer: given[0]}))
    model.eval()(IMAGES)
    for layer, given in seen.items():
        for channel in range(layer.num_features):
            values = given[:, channel].flatten().double().tolist()
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            assert float(layer.running_mean[channel]) == pytest.approx(mean, rel=1e-5, abs=1e-6)
            assert float(layer.running_var[channel]) == pytest.approx(variance, rel=1e-4)


def test_the_first_layer_sees_what_torch_averages_over_one_batch_of_all_rows():
    model, other = network(), network()
    recalibrate(model, asked(model))
    for layer in norms(other):
        layer.reset_running_stats()
        layer.momentum = None
    other.train()(IMAGES)
    torch.testing.assert_close(model.layers[0].norm.running_mean, other.layers[0].norm.running_mean)
    torch.testing.assert_close(model.layers[0].norm.running_var, other.layers[0].norm.running_var)


def test_batches_change_nothing_and_nothing_else_is_changed():
    model, other = network().train(), network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recalibrate(model, asked(model))
    recalibrate(other, asked(other, batch_size=3))
    assert model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])
        moves = name.endswith(("running_mean", "running_var"))
        assert torch.equal(value, before[name]) != moves, name


class Backwards(nn.Module):
    """Uses its layers in another order than it has them, and one of them not at all."""

    def __init__(self):
        super().__init__()
        self.last, self.never, self.first = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.last(self.first(x) ** 2)


def test_layers_are_done_in_the_order_in_which_they_are_used():
    model, x = Backwards(), torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    assert recalibrate(model, asked(model, x)) == 2
    torch.testing.assert_close(model.first.running_mean, x.mean(dim=0))
    torch.testing.assert_close(model.last.running_mean, (model.first.eval()(x) ** 2).mean(dim=0))
    assert model.never.running_mean.tolist() == [0, 0, 0]


def test_a_model_without_batch_normalisation_is_not_asked_at_all():
    assert recalibrate(nn.Linear(2, 2), lambda: pytest.fail("asked")) == 0
