"""What every ensembling method keeps, by being a file of the family."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lfm
from lfm.ensembling.base import Build, Combine
from tests.lfm.variants import every

ALL = every("ensembling")
COMBINE = pytest.mark.parametrize("method", [p for p in ALL if isinstance(p.values[0], Combine)])
BUILD = pytest.mark.parametrize("method", [p for p in ALL if isinstance(p.values[0], Build)])
WIDTH, EXPERTS, IDS = 6, 2, torch.tensor([[1, 2, 3, 4], [4, 3, 2, 2]])


class Attention(nn.Module):
    """Mixes each place with those before it, or with all that are no padding."""

    def __init__(self, causal):
        super().__init__()
        self.causal, self.out = causal, nn.Linear(WIDTH, WIDTH)

    def forward(self, x, attention_mask=None):
        seen = torch.ones(len(x), x.shape[1]) if attention_mask is None else attention_mask.float()
        shares = seen[:, None, :].expand(-1, x.shape[1], -1)
        shares = shares.tril() if self.causal else shares
        return self.out(shares @ x / shares.sum(-1, keepdim=True))


class Layer(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(causal)
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x, attention_mask=None):
        x = x + self.attention(x, attention_mask=attention_mask)
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Network(nn.Module):
    """As little as a transformer can be."""

    def __init__(self, causal):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 5)
        self.layers = nn.ModuleList(Layer(causal) for _ in range(2))

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask)
        return self.head(x)


def network(causal=False):
    torch.manual_seed(0)
    return Network(causal)


def experts_of(base, seed=1, size=0.5):
    """Copies that have learnt something."""
    draw = torch.Generator().manual_seed(seed)
    found = [copy.deepcopy(base) for _ in range(EXPERTS)]
    with torch.no_grad():
        for parameter in (p for e in found for p in e.parameters()):
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return found


@torch.no_grad()
def built(method, base, experts, *, causal=False):
    """As the operator builds it, and fills it."""
    made = copy.deepcopy(base)
    torch.manual_seed(3)
    rooms = method.build(made, len(experts), causal=causal)
    for name, value in base.named_parameters():
        stack = torch.stack([e.get_parameter(name) for e in experts])
        if name in rooms:
            made.get_parameter(rooms[name]).copy_(stack - value)
        else:
            made.get_parameter(name).copy_(method.merge(name, value, stack))
    return made, rooms


def new_in(made, base, rooms):
    known = {*dict(base.named_parameters()), *rooms.values()}
    return {n: p for n, p in made.named_parameters() if n not in known}


@torch.no_grad()
def disturbed(made, base, rooms):
    """As if what is new had learnt a lot."""
    torch.manual_seed(4)
    for parameter in new_in(made, base, rooms).values():
        parameter.normal_(std=0.3)
    return made


@pytest.fixture
def said():
    draw = torch.Generator().manual_seed(0)
    return (3 * torch.randn(EXPERTS, 3, 4, 6, generator=draw)).log_softmax(dim=-1)


@COMBINE
def test_what_it_says_is_a_distribution_of_each_place_and_nothing_else_changes(method, said):
    method.check(EXPERTS)
    before = said.clone()
    found = method.combine(said)
    assert (found.shape, found.dtype) == (said.shape[1:], torch.float32)
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(3, 4))
    assert torch.equal(said, before)
    assert torch.equal(pickle.loads(pickle.dumps(method)).combine(said), found)
    for i in range(3):
        torch.testing.assert_close(method.combine(said[:, i]), found[i])
    turned = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(method.combine(said[..., turned]), found[..., turned])


@COMBINE
def test_models_that_agree_say_what_each_says(method, said):
    torch.testing.assert_close(method.combine(torch.stack([said[0]] * EXPERTS)), said[0])


@BUILD
@pytest.mark.parametrize("causal", [False, True])
def test_what_was_there_keeps_its_name_and_deltas_have_their_place(method, causal):
    base = network(causal)
    made, rooms = built(method, base, experts_of(base), causal=causal)
    assert {*dict(base.named_parameters())} <= {*dict(made.named_parameters())}
    for name, room in rooms.items():
        assert torch.equal(made.get_parameter(name), base.get_parameter(name))
        assert made.get_parameter(room).shape == (EXPERTS, *base.get_parameter(name).shape)
    assert new_in(made, base, rooms), "nothing in it learns"
    with torch.device("meta"):
        outline = Network(causal)
        assert method.build(outline, EXPERTS, causal=causal) == rooms


@BUILD
def test_experts_that_learnt_nothing_give_the_base_whatever_is_learnt(method):
    base = network()
    made, rooms = built(method, base, [copy.deepcopy(base)] * EXPERTS)
    torch.testing.assert_close(disturbed(made, base, rooms)(IDS), base(IDS))


@BUILD
def test_it_starts_the_same_again_and_a_copy_is_on_its_own(method):
    base = network()
    made, rooms = built(method, base, experts_of(base))
    again, _ = built(pickle.loads(pickle.dumps(method)), base, experts_of(base))
    assert torch.equal(made(IDS), again(IDS))
    twin = copy.deepcopy(made)
    before = made(IDS)
    assert not torch.allclose(disturbed(twin, base, rooms)(IDS), before, atol=1e-2)
    assert torch.equal(made(IDS), before)


@BUILD
def test_a_text_does_not_depend_on_the_texts_beside_it_nor_on_padding(method):
    base = network()
    made, rooms = built(method, base, experts_of(base))
    disturbed(made, base, rooms)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    together = made(IDS, attention_mask=mask)
    torch.testing.assert_close(together[0], made(IDS[:1])[0])
    torch.testing.assert_close(together[1, :2], made(IDS[1:, :2])[0])


@BUILD
def test_where_it_is_causal_no_place_depends_on_what_follows(method):
    base = network(causal=True)
    made, rooms = built(method, base, experts_of(base), causal=True)
    disturbed(made, base, rooms)
    whole = made(IDS)
    for n in (1, 2, 3):
        torch.testing.assert_close(made(IDS[:, :n]), whole[:, :n])


@BUILD
def test_all_that_is_new_gets_a_gradient_and_the_objective_is_a_number_for_each_row(method):
    base = network()
    made, rooms = built(method, base, experts_of(base))
    disturbed(made, base, rooms)
    told = method.objective(made(IDS)[:, 0])
    assert told.shape == (2,)
    told.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new_in(made, base, rooms).values())


@pytest.mark.parametrize("name", lfm.names("ensembling"))
def test_it_combines_or_it_builds(name):
    assert issubclass(lfm.find(name), Combine) != issubclass(lfm.find(name), Build)
