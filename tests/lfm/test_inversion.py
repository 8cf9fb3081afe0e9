import pytest
import torch
from torch import nn

from lfm.inversion import norm_statistics, total_variation
from lfm.networks import ImageNetwork, Network


def network(kind="cnn"):
    torch.manual_seed(0)
    model = ImageNetwork(Network(kind=kind, widths=(3, 2)), (1, 4, 5), 3)
    model(torch.rand(8, 1, 4, 5))  # in training: its statistics move away from 0 and 1
    return model.eval()


def by_hand(x, norm):
    """The distance between means plus that between variances, number by number."""
    means, variances = 0.0, 0.0
    for channel in range(x.shape[1]):
        values = x[:, channel].flatten().tolist()
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        means += (mean - float(norm.running_mean[channel])) ** 2
        variances += (variance - float(norm.running_var[channel])) ** 2
    return means**0.5 + variances**0.5


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_the_distance_to_what_batch_normalisation_saw_is_that_of_means_and_variances(kind):
    model, images = network(kind), torch.rand(4, 1, 4, 5, generator=torch.Generator().manual_seed(1))
    given = {}
    for number, layer in enumerate(model.layers):
        layer.norm.register_forward_pre_hook(lambda _, x, number=number: given.update({number: x[0].detach()}))
    with torch.no_grad(), norm_statistics(model) as seen:
        model(images)
        model(images)  # the last pass counts
    assert len(seen.distances) == 2
    wanted = sum(by_hand(given[number], layer.norm) for number, layer in enumerate(model.layers))
    assert float(seen.loss()) == pytest.approx(wanted, rel=1e-4)


def test_it_is_0_for_a_batch_that_has_exactly_these_statistics():
    norm = nn.BatchNorm2d(3).eval()
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    norm.running_mean, norm.running_var = x.detach().mean(dim=(0, 2, 3)), x.detach().var(dim=(0, 2, 3), unbiased=False)
    with norm_statistics(norm) as seen:
        norm(x)
    assert torch.equal(seen.loss().detach(), torch.tensor(0.0))
    (slope,) = torch.autograd.grad(seen.loss(), x)
    assert torch.equal(slope, torch.zeros_like(x))


def test_watching_ends_and_changes_nothing():
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with norm_statistics(model) as seen:
        model(torch.rand(4, 1, 4, 5))
    first = list(seen.distances)
    model(torch.rand(4, 1, 4, 5))
    assert list(map(id, seen.distances)) == list(map(id, first))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_total_variation_is_the_length_of_the_differences_between_neighbours_in_four_directions():
    images = torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(3))
    wanted = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = 0.0
        for image in images:
            for channel in image:
                for y in range(3):
                    for x in range(4):
                        if 0 <= y + down < 3 and 0 <= x + right < 4:
                            squares += float(channel[y + down, x + right] - channel[y, x]) ** 2
        wanted += squares**0.5
    assert float(total_variation(images)) == pytest.approx(wanted, rel=1e-5)
    assert float(total_variation(torch.full((2, 1, 3, 4), 0.7))) == 0
