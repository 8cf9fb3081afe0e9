"""What every editing method keeps, by being a file of the family."""

import pickle

import pytest
import torch

from lfm.deltas import applied
from lfm.editing.base import TOKENS, Fact, Prompt
from lfm.hooks import Blocks, inputs_of
from tests.lfm.variants import every
from tests.operators import small

pytestmark = pytest.mark.slow

METHODS = pytest.mark.parametrize("method", every("editing"))
FACT = Fact(
    [Prompt(torch.tensor([5, 6, 7, 8]), (2, 4)), Prompt(torch.tensor([9, 11, 5, 6, 7, 8]), (4, 6))],
    torch.tensor([20]),
    Prompt(torch.tensor([7, 8, 30, 31]), (0, 2)),
)


@pytest.fixture(scope="module")
def there():
    """A model, its blocks and what was measured of all MLPs' keys."""
    model = small.model("llama", mlp_bias=True, num_hidden_layers=4).eval()
    blocks = Blocks(model)
    ids = torch.randint(1, small.VOCABULARY, (40, 30), generator=torch.Generator().manual_seed(0))
    names = [block.mlp_out for block in blocks]
    with torch.no_grad(), inputs_of(model, names) as seen:
        model(input_ids=ids)
    keys = {name: seen[name].flatten(0, 1) for name in names}
    statistics = {f"gram/{name}": k.T @ k for name, k in keys.items()}
    return model, blocks, {**statistics, TOKENS: torch.tensor(float(ids.numel()))}


def solved(method, there, editor=None):
    model, blocks, statistics = there
    known = {k: v for k, v in statistics.items() if k == TOKENS or k.partition("/")[0] in method.needs.statistics}
    return method.solve(model, blocks, [FACT], statistics=known, editor=editor)


def taught(method, there):
    """What a method works through, where it does so: an editor that has learnt nothing yet."""
    if not method.taught:
        return None
    torch.manual_seed(0)
    editor = method.build(*there[:2])
    method.observe(editor, *there[:2], [FACT])
    return editor


def changes(delta):
    return {name: change.whole() for name, change in delta.items()}


@METHODS
def test_it_fits_the_model_and_leaves_it_as_it_was(method, there):
    model, blocks, _ = there
    method.check(len(blocks))
    editor = taught(method, there)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    delta = solved(method, there, editor)
    assert delta
    for name, value in changes(delta).items():
        assert (value.shape, value.dtype) == (before[name].shape, torch.float32)
        assert value.isfinite().all()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not any(m.training for m in model.modules())
    with applied(model, delta):
        pass
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@METHODS
def test_it_gives_the_same_again_whatever_is_drawn_elsewhere_and_in_another_process(method, there):
    editor = taught(method, there)
    first = changes(solved(method, there, editor))
    torch.manual_seed(12345)
    drawn = torch.get_rng_state()
    again = changes(solved(pickle.loads(pickle.dumps(method)), there, editor))
    assert torch.equal(torch.get_rng_state(), drawn), "it draws from the generator that all share"
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@METHODS
def test_what_needs_no_teaching_makes_the_fact_likelier(method, there):
    if method.taught:
        pytest.skip("it has learnt nothing yet")

    def likelihood():
        with torch.no_grad():
            told = there[0](input_ids=FACT.prompts[0].ids[None]).logits[0, -1]
        return told.log_softmax(-1)[FACT.target[0]].item()

    before = likelihood()
    with applied(there[0], solved(method, there)):
        assert likelihood() > before
    assert likelihood() == before
