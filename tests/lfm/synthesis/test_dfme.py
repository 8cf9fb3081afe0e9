import copy

import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.networks import ImageNetwork, Network
from lfm.oracle import BudgetSpent, Oracle
from lfm.synthesis._generator import Generator, pixels
from lfm.synthesis.dfme import DFME, logits
from tests.lfm.synthesis.bars import SHAPE, trained

SMALL = {"batch_size": 4, "latent": 3, "width": 2, "student_steps": 2}


@pytest.fixture(scope="module")
def teacher():
    """A network that tells the three kinds of bars apart."""
    return trained(Network(widths=(8, 8)))


def asked(teacher, budget=None):
    """The same model behind a wall."""
    return Oracle(lambda images: teacher(images).softmax(dim=-1), budget=budget)


def student(seed=1, network=None):
    torch.manual_seed(seed)
    return ImageNetwork(network or Network(widths=(4,), batchnorm=False), SHAPE, 3)


def test_logits_come_back_from_probabilities_up_to_their_mean():
    said = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 5.0, 0.5]])
    torch.testing.assert_close(logits(said.softmax(dim=-1)), said - said.mean(dim=-1, keepdim=True))
    sure = logits(torch.tensor([[1.0, 0.0]]))
    assert sure.isfinite().all()
    assert sure[0, 0] > sure[0, 1]


def test_it_asks_exactly_as_often_as_it_says_and_never_more_than_its_budget(teacher):
    method = DFME(**SMALL, directions=3, budget=100)
    assert (method.asks, method.rounds) == (4 * (1 + 3 + 2), 4)
    oracle, copied = asked(teacher, budget=100), student()
    state = method.start(SHAPE, 3, seed=0)
    for done in range(4):
        state, batch = method.round(state, oracle, copied)
        assert oracle.spent == 24 * (done + 1)
        assert batch.images.shape == (4, *SHAPE)
        assert 0 <= batch.images.min() <= batch.images.max() <= 1
    with pytest.raises(BudgetSpent, match=r"16 more questions after 96, expected 100 in all"):
        method.round(state, oracle, copied)
    assert oracle.spent == 96


def test_a_round_is_the_papers_step_by_step(teacher):
    """The same with one image and one direction at a time, on optimizers of torch that live on."""
    method = DFME(**SMALL, directions=2, budget=4 * 5 * 2, generator_rate=0.01, epsilon=1e-2)
    copied = student()
    there = copy.deepcopy(copied)
    start = method.start(SHAPE, 3, seed=5)
    state = start
    for _ in range(2):
        state, batch = method.round(state, asked(teacher), copied)

    generator = Generator(SHAPE, latent=3, width=2)
    generator.load_state_dict({n.removeprefix("generator."): t for n, t in start.items() if n.startswith("generator.")})
    explorer = torch.optim.Adam(generator.parameters(), lr=0.01)
    learner = torch.optim.SGD(there.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    draw = torch.Generator()
    draw.set_state(start["draws"])

    def distance(x):
        image = pixels(x)[None]
        p = teacher(image)[0].softmax(dim=-1).log()
        return sum(abs(s - t) for s, t in zip(there(image)[0], p - p.mean(), strict=True))

    for number in range(2):
        rate = 0.3 ** sum(number >= share * 2 for share in (0.1, 0.3, 0.5))
        explorer.param_groups[0]["lr"], learner.param_groups[0]["lr"] = 0.01 * rate, 0.1 * rate
        made = generator(torch.randn(4, 3, generator=draw))
        u = torch.randn(2, *made.shape, generator=draw)
        up = torch.zeros_like(made)
        with torch.no_grad():
            for image in range(4):
                for along in range(2):
                    unit = u[along, image] / u[along, image].square().sum().sqrt()
                    rise = distance(made[image] + 1e-2 * unit) - distance(made[image])
                    up[image] += 36 / 2 * rise / 1e-2 * unit / 4
        explorer.zero_grad()
        (-(up * made).sum()).backward()  # Adam goes down: up the estimate
        explorer.step()
        for _ in range(2):
            images = pixels(generator(torch.randn(4, 3, generator=draw))).detach()
            learner.zero_grad()
            (sum(distance(torch.atanh(2 * image - 1)) for image in images) / 12).backward()
            learner.step()
    torch.testing.assert_close(batch.images, images, atol=2e-3, rtol=0)
    for mine, theirs in zip(copied.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-2)


def test_the_generator_raises_the_distance_that_the_student_lowers(teacher):
    """With the student at rest its images get harder, as far as a small step leads."""
    method = DFME(batch_size=32, latent=4, width=8, directions=36, student_steps=1, budget=32 * 38 * 100)
    at_rest = student().eval()

    def hardness(state):
        noise = torch.randn(200, 4, generator=torch.Generator().manual_seed(9))
        images = pixels(method._generator(state)(noise)).detach()
        with torch.no_grad():
            return float((at_rest(images) - logits(teacher(images).softmax(dim=-1))).abs().sum(dim=-1).mean())

    state = method.start(SHAPE, 3, seed=0)
    before = hardness(state)
    generator = method._generator(state)
    explorer = torch.optim.Adam(generator.parameters(), lr=0.003)
    for _ in range(10):
        method._explore(generator, explorer, asked(teacher), at_rest, torch.Generator().manual_seed(1))
    state = {f"generator.{name}": value for name, value in generator.state_dict().items()} | {"shape": state["shape"]}
    assert hardness(state) > before


def test_two_halves_that_were_apart_are_one_whole(teacher):
    """What is kept between rounds is all: another process goes on from it, bit for bit."""
    method = DFME(**SMALL, budget=16 * 4)
    whole, half = student(), student()
    state = method.start(SHAPE, 3, seed=2)
    for _ in range(4):
        state, batch = method.round(state, asked(teacher), whole)
    again = method.start(SHAPE, 3, seed=2)
    for _ in range(2):
        again, _ = method.round(again, asked(teacher), half)
    kept, weights = {n: t.clone() for n, t in again.items()}, copy.deepcopy(half.state_dict())
    other = student(seed=7)
    other.load_state_dict(weights)
    for _ in range(2):
        kept, last = method.round(kept, asked(teacher), other)
    assert torch.equal(last.images, batch.images)
    assert all(map(torch.equal, other.state_dict().values(), whole.state_dict().values()))
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[n], kept[n]) for n in state)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget", 1791),
        ("batch_size", 1),
        ("directions", 0),
        ("student_steps", 0),
        ("epsilon", 0.0),
        ("student_rate", 0.0),
        ("weight_decay", -1.0),
        ("generator_rate", 0.0),
        ("latent", 0),
        ("width", 0),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(HyperparameterError, match=f"{field}={value}, expected"):
        DFME(**{field: value})
