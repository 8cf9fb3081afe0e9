"""What every method of synthesis keeps, by being a file of the family."""

import copy
import pickle
from dataclasses import fields, replace

import pytest
import torch

from lfm.networks import ImageNetwork, Network
from lfm.oracle import Oracle
from tests.lfm.synthesis.bars import SHAPE, trained
from tests.lfm.variants import every

pytestmark = pytest.mark.slow

METHODS = pytest.mark.parametrize("method", every("synthesis"))
LITTLE = {"batch_size": 6, "num_images": 12, "steps": 2, "latent": 3, "width": 2, "budget": 84}


@pytest.fixture(scope="module")
def teacher():
    """A network that tells the three kinds of bars apart."""
    return trained(Network(widths=(4,)), steps=6)


def small(method):
    return replace(method, **{f.name: LITTLE[f.name] for f in fields(method) if f.name in LITTLE})


def made(method, teacher, seed=0, rounds=2):
    """Every batch, the last state and the student after some rounds."""
    torch.manual_seed(1)
    student = ImageNetwork(Network(widths=(3,), batchnorm=False), SHAPE, 3) if method.meets_student else None
    given = Oracle(lambda x: teacher(x).softmax(dim=-1)) if method.needs.access == "probabilities" else teacher
    state, batches = method.start(SHAPE, 3, seed=seed), []
    for _ in range(rounds):
        kept = {name: tensor.clone() for name, tensor in state.items()}
        after, batch = method.round(state, given, student)
        assert all(torch.equal(state[name], kept[name]) for name in kept)
        state = after
        batches.append(batch)
    return batches, state, {} if student is None else student.state_dict()


@METHODS
def test_it_makes_batches_of_images_whose_pixels_are_in_their_range(method, teacher):
    method, before = small(method), copy.deepcopy(teacher.state_dict())
    assert method.gives in ("dataset", "model")
    assert method.rounds == 2
    for batch in made(method, teacher)[0]:
        assert batch.images.shape == (6, *SHAPE)
        assert batch.images.dtype == torch.float32
        assert not batch.images.requires_grad
        assert 0 <= batch.images.min() <= batch.images.max() <= 1
        assert batch.labels.dtype == torch.int64
        assert 0 <= batch.labels.min() <= batch.labels.max() < 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@METHODS
def test_its_seed_alone_decides_what_it_makes(method, teacher):
    method = small(method)
    batches, state, student = made(method, teacher)
    torch.manual_seed(12345)
    again = made(pickle.loads(pickle.dumps(method)), teacher)
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again[0], strict=True))
    assert all(torch.equal(state[name], again[1][name]) for name in state)
    assert all(torch.equal(student[name], again[2][name]) for name in student)
    assert not torch.equal(batches[0].images, made(method, teacher, seed=1)[0][0].images)
    assert not torch.equal(batches[0].images, batches[1].images)


@METHODS
def test_its_state_is_tensors_that_safetensors_holds(method, teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    method = small(method)
    for state in (method.start(SHAPE, 3, seed=0), made(method, teacher)[1]):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "state.safetensors")
        back = load_file(tmp_path / "state.safetensors")
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
