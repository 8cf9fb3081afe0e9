import copy

import pytest
import torch

from lfm.synthesis._generator import Generator, pixels

NOISE = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))


def generator(shape):
    torch.manual_seed(1)
    return Generator(shape, latent=5, width=3)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 1, 3)])
def test_images_are_of_any_shape_and_normalised_over_the_batch(shape):
    made = generator(shape)(NOISE).detach()
    assert made.shape == (16, *shape)
    for channel in made.transpose(0, 1):
        assert float(channel.mean()) == pytest.approx(0, abs=1e-5)
        assert float(channel.square().mean()) == pytest.approx(1, rel=1e-2)


def test_their_contrast_does_not_depend_on_how_large_the_last_weights_are():
    one = generator((1, 8, 8))
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.convolutions[2].weight.mul_(10)
        torch.testing.assert_close(other(NOISE), one(NOISE), atol=1e-2, rtol=0)


def test_any_number_becomes_a_pixel():
    torch.testing.assert_close(pixels(torch.tensor([-100.0, 0.0, 100.0])), torch.tensor([0.0, 0.5, 1.0]))
    slope = (pixels(torch.tensor(1e-3)) - pixels(torch.tensor(-1e-3))) / 2e-3
    assert float(slope) == pytest.approx(0.5, rel=1e-3)
