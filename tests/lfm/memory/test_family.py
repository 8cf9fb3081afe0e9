"""What every memory keeps, by being a file of the family."""

import json
import pickle

import pytest
import torch

from lfm.editing.base import Fact, Prompt
from lfm.hooks import Blocks
from tests.lfm.variants import every
from tests.operators import small

pytestmark = pytest.mark.slow

METHODS = pytest.mark.parametrize("method", every("memory"))
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def fact(ids, target):
    prompt = Prompt(torch.tensor(ids), (1, 3))
    return Fact([prompt], torch.tensor(target), prompt)


FACTS = [fact([5, 6, 7, 8], [20]), fact([30, 31, 32], [40, 41]), fact([50, 51, 52, 53], [60])]


@pytest.fixture(scope="module")
def there():
    model = small.model("llama", num_hidden_layers=4).eval()
    return model, Blocks(model)


@pytest.fixture(scope="module")
def remembered(there):
    """What a method remembers of all facts, once for all tests."""
    made = {}

    def remembered_(method):
        if method not in made:
            made[method] = method.remember(None, *there, FACTS, seed=3)
        return made[method]

    return remembered_


def same(one, other):
    tensors = one.tensors.keys() == other.tensors.keys()
    return (
        tensors and one.notes == other.notes and all(torch.equal(v, other.tensors[n]) for n, v in one.tensors.items())
    )


def copied(state):
    return {n: v.clone() for n, v in state.tensors.items()}, json.dumps(state.notes)


@torch.no_grad()
def said(model, ids=IDS, **others):
    return model(input_ids=ids, **others).logits


@METHODS
def test_remembering_leaves_the_model_as_it_was_and_can_be_kept_in_files(method, there, remembered):
    model, blocks = there
    method.check(len(blocks))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = said(model)
    state = remembered(method)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(said(model), first)
    assert all(v.device.type == "cpu" and v.isfinite().all() for v in state.tensors.values())
    assert json.loads(json.dumps(dict(state.notes))) == dict(state.notes)


@METHODS
def test_it_remembers_the_same_again_in_another_process_and_bit_by_bit(method, there, remembered):
    whole = remembered(method)
    torch.manual_seed(12345)
    drawn = torch.get_rng_state()
    assert same(pickle.loads(pickle.dumps(method)).remember(None, *there, FACTS, seed=3), whole)
    first = method.remember(None, *there, FACTS[:1], seed=3)
    before = copied(first)
    assert same(method.remember(first, *there, FACTS[1:], seed=3), whole)
    assert copied(first)[1] == before[1], "what was remembered before has changed"
    assert all(torch.equal(v, before[0][n]) for n, v in first.tensors.items())
    assert torch.equal(torch.get_rng_state(), drawn), "it draws from the generator that all share"


@METHODS
def test_what_is_attached_is_gone_when_its_handle_is_removed(method, there, remembered):
    model, blocks = there
    first = said(model)
    with method.attach(model, blocks, remembered(method)):
        said(model)
    assert torch.equal(said(model), first)
    handle = method.attach(model, blocks, remembered(method))
    handle.remove()
    assert torch.equal(said(model), first)


@METHODS
def test_with_it_the_facts_are_likelier_and_every_row_is_answered_by_itself(method, there, remembered):
    model, blocks = there

    def likelihood(one):
        return said(model, one.prompts[0].ids[None])[0, -1].log_softmax(-1)[one.target[0]].item()

    before = [likelihood(one) for one in FACTS]
    with method.attach(model, blocks, remembered(method)):
        assert all(likelihood(one) >= old for one, old in zip(FACTS, before, strict=True))
        assert any(likelihood(one) > old for one, old in zip(FACTS, before, strict=True))
        alone = said(model)
        padded = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], dim=1)
        mask = (torch.arange(9) < 6).long()[None]
        beside = said(
            model, torch.cat([padded, padded.flip(1)]), attention_mask=torch.cat([mask, torch.ones_like(mask)])
        )
        torch.testing.assert_close(beside[:1, :6], alone, rtol=1e-4, atol=1e-4)
