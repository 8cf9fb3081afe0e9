"""What every prompting method keeps, by being a file of the family."""

import pickle
from dataclasses import replace

import pytest
import torch

from tests.lfm.variants import every

pytestmark = pytest.mark.slow

METHODS = pytest.mark.parametrize("method", every("prompting"))
INITIAL = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def searched(method, rounds=4, seed=3):
    """What is asked when the score is how far a prompt is from 0, the scores, and the best prompt."""
    small = replace(method, length=len(INITIAL))
    state = small.start(INITIAL, spread=0.1, seed=seed)
    asked, told = [], []
    for _ in range(rounds):
        candidates = small.ask(state)
        asked.append(candidates.clone())
        told.append(candidates.square().sum(dim=(1, 2)))
        state = small.tell(state, told[-1])
    return torch.cat(asked), torch.cat(told), small.best(state)


@METHODS
def test_it_gives_the_best_of_the_prompts_that_it_asked_for(method):
    before = INITIAL.clone()
    asked, told, best = searched(method)
    assert torch.equal(INITIAL, before)
    assert (asked.shape[1:], asked.dtype) == (INITIAL.shape, torch.float32)
    assert not asked.requires_grad
    torch.testing.assert_close(best, asked[told.argmin()])


@METHODS
def test_its_seed_alone_decides_what_it_asks(method):
    first = searched(method)
    torch.manual_seed(12345)
    again = searched(pickle.loads(pickle.dumps(method)))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], searched(method, seed=4)[0])


@METHODS
def test_a_right_label_scores_better_than_a_wrong_one(method):
    right = torch.tensor([[[0.7, 0.1], [0.2, 0.6]], [[0.1, 0.7], [0.6, 0.2]]])
    scores = method.score(right, torch.tensor([0, 1]))
    assert scores.shape == (2,)
    assert scores[0] < scores[1]
