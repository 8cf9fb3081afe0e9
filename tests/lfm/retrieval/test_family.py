"""What every retrieval method keeps, by being a file of the family."""

import pickle

import numpy as np
import pytest
import torch

from lfm.retrieval.base import Neighbours
from tests.lfm.variants import every

METHODS = pytest.mark.parametrize("method", every("retrieval"))


@pytest.fixture
def said():
    """What a model says at some places, and what was found for each; for the last one nothing."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 9, generator=draw)
    distances = 4 * torch.rand(5, 4, generator=draw).sort(dim=1).values
    distances[-1] = torch.inf
    return logits, Neighbours(distances, torch.randint(0, 9, (5, 4), generator=draw))


@METHODS
def test_what_it_tells_is_a_distribution_and_nothing_else_changes(method, said):
    logits, found = said
    before = logits.clone(), found.distances.clone(), found.tokens.clone()
    mixed = method.combine(logits, found)
    assert (mixed.shape, mixed.dtype) == (logits.shape, torch.float32)
    torch.testing.assert_close(mixed.exp().sum(dim=1), torch.ones(5))
    torch.testing.assert_close(mixed[-1], logits[-1].log_softmax(dim=-1))
    assert all(map(torch.equal, before, (logits, found.distances, found.tokens)))
    assert torch.equal(pickle.loads(pickle.dumps(method)).combine(logits, found), mixed)
    each = [method.combine(logits[i : i + 1], Neighbours(found.distances[[i]], found.tokens[[i]])) for i in range(5)]
    torch.testing.assert_close(torch.cat(each), mixed)


@METHODS
def test_what_it_tells_of_one_token_is_what_it_tells_of_all(method, said):
    logits, found = said
    own = logits.log_softmax(dim=-1)
    for token in range(9):
        targets = torch.full((5,), token)
        told = method.told(own[:, token], targets, found)
        torch.testing.assert_close(told, method.combine(logits, found)[:, token])


@METHODS
def test_a_stored_key_is_its_own_nearest_neighbour(method):
    small = type(method)(**{**method.hyperparameters(), "k": 3, "centroids": 1, "probes": 1, "code_bytes": 4})
    draw = np.random.default_rng(0)
    keys, values = draw.standard_normal((300, 8)).astype(np.float32), np.arange(300, dtype=np.int32)
    search = small.opened(keys, values, small.build(keys))
    found = search.nearest(torch.from_numpy(keys[:6]), small.k)
    assert found.tokens[:, 0].tolist() == list(range(6))
    torch.testing.assert_close(found.distances[:, 0], torch.zeros(6), rtol=0, atol=1e-4)
    assert (found.distances.diff(dim=1) >= 0).all()
