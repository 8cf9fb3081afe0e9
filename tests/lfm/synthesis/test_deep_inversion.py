import math

import pytest
import torch
from torch.nn import functional

from lfm.errors import HyperparameterError
from lfm.inversion import norm_statistics, total_variation
from lfm.networks import ImageNetwork, Network
from lfm.synthesis.deep_inversion import DeepInversion
from tests.lfm.synthesis.bars import SHAPE, bars, trained

IMAGES = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
ALONE = {"total_variation": 0.0, "l2": 0.0, "batchnorm": 0.0}


@pytest.fixture(scope="module")
def teacher():
    """A network that tells the three kinds of bars apart."""
    return trained(Network(widths=(8, 8)))


def test_its_loss_is_the_weighted_sum_of_its_terms(teacher):
    """Each of them by numbers in a loop."""
    method = DeepInversion(total_variation=0.5, l2=0.25, batchnorm=3.0)
    wanted = 0.0
    for said, label in zip(teacher(IMAGES).tolist(), LABELS.tolist(), strict=True):
        wanted -= math.log(math.exp(said[label]) / sum(map(math.exp, said))) / 6
    with torch.no_grad(), norm_statistics(teacher) as seen:
        teacher(IMAGES)
    wanted += 3.0 * sum(map(float, seen.distances)) + 0.5 * float(total_variation(IMAGES))
    wanted += 0.25 * sum(x**2 for x in IMAGES.flatten().tolist()) ** 0.5
    assert float(method.loss(IMAGES, LABELS, teacher).detach()) == pytest.approx(wanted, rel=1e-4)


def test_competition_adds_what_teacher_and_student_agree_on(teacher):
    torch.manual_seed(1)
    student = ImageNetwork(Network(kind="mlp", widths=(4,), batchnorm=False), SHAPE, 3).eval()
    alone = DeepInversion(**ALONE)
    divergence = 0.0
    for p, q in zip(teacher(IMAGES).softmax(1).tolist(), student(IMAGES).softmax(1).tolist(), strict=True):
        for mine, other in (p, q), (q, p):
            divergence += sum(a * math.log(2 * a / (a + b)) for a, b in zip(mine, other, strict=True)) / 2 / 6
    with torch.no_grad():
        before = float(alone.loss(IMAGES, LABELS, teacher, student))
        found = float(DeepInversion(**ALONE, competition=2.0).loss(IMAGES, LABELS, teacher, student))
        same = float(DeepInversion(**ALONE, competition=2.0).loss(IMAGES, LABELS, teacher, teacher))
    assert found - before == pytest.approx(2 * (1 - divergence), rel=1e-4)
    assert same - before == pytest.approx(2, rel=1e-4)


def test_a_step_is_adams_step_on_the_pixels_clipped_to_their_range(teacher):
    method = DeepInversion(num_images=6, batch_size=6, steps=1, learning_rate=0.3)
    start = method.start(SHAPE, 3, seed=4)
    _, batch = method.round(start, teacher, None)
    x = start["noise"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(method.loss(x, start["labels"], teacher), x)
    wanted = (start["noise"] - 0.3 * slope / (slope.abs() + 1e-8)).clamp(0, 1)  # the first step of Adam
    torch.testing.assert_close(batch.images, wanted)


def test_the_teacher_takes_its_images_for_their_targets_and_remembers_such_statistics(teacher):
    method = DeepInversion(num_images=60, batch_size=60, steps=60, learning_rate=0.05)
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    start = method.start(SHAPE, 3, seed=0)
    teacher.train()
    _, batch = method.round(start, teacher, None)
    assert teacher.training
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    teacher.eval()
    assert (teacher(batch.images).argmax(dim=1) == batch.labels).float().mean() > 0.9
    distances = []
    for images in (start["noise"], batch.images, bars(60)[0]):
        with torch.no_grad(), norm_statistics(teacher) as seen:
            teacher(images)
        distances.append(float(seen.loss()))
    noise, made, real = distances
    assert made < noise / 3
    assert made < 3 * real


def test_no_step_leaves_the_noise_and_every_round_has_noise_of_its_own(teacher):
    method = DeepInversion(num_images=8, batch_size=4, steps=0)
    start = method.start(SHAPE, 3, seed=0)
    state, first = method.round(start, teacher, None)
    _, second = method.round(state, teacher, None)
    assert torch.equal(first.images, start["noise"])
    assert torch.equal(second.images, state["noise"])
    assert not torch.equal(first.images, second.images)
    assert functional.one_hot(first.labels, 3).sum(dim=0).tolist() == [2, 1, 1]


def test_jitter_rolls_the_batch_before_it_is_looked_at(teacher):
    still, shaken = (DeepInversion(num_images=4, batch_size=4, steps=3, jitter=j) for j in (0, 2))
    start = still.start(SHAPE, 3, seed=0)
    assert not torch.equal(still.round(start, teacher, None)[1].images, shaken.round(start, teacher, None)[1].images)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 1),
        ("num_images", 100),
        ("steps", -1),
        ("learning_rate", 0.0),
        ("total_variation", -1.0),
        ("l2", -1.0),
        ("batchnorm", -1.0),
        ("competition", -1.0),
        ("jitter", -1),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(HyperparameterError, match=f"{field}={value}, expected"):
        DeepInversion(**{field: value})
