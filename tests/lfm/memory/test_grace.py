import functools
import itertools
import math

import pytest
import torch
from torch import nn

from lfm.editing.base import Fact, Prompt
from lfm.errors import HyperparameterError
from lfm.hooks import Blocks, inputs_of
from lfm.memory.base import OtherMemory
from lfm.memory.grace import GRACE, Codebook
from operators.engines.native import Native, Sampling
from tests.operators import small

pytestmark = pytest.mark.slow

# ---- where keys go: a network whose key is its last token's place in a plane


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.weigh = nn.Linear(2, 2)

    def forward(self, x, attention_mask=None):
        return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.widen, self.narrow = Attention(), nn.Linear(2, 4), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(2)

    def forward(self, x):
        return x + self.narrow(self.widen(x))


class Plane(nn.Module):
    """Each token is a place in the plane; what narrows gets that place, and the head knows eight directions."""

    def __init__(self, places):
        super().__init__()
        self.places = nn.Embedding(len(places), 2)
        self.layers = nn.ModuleList([Layer()])
        self.head = nn.Linear(2, 8, bias=False)
        with torch.no_grad():
            self.places.weight.copy_(torch.tensor(places))
            self.layers[0].widen.weight.copy_(torch.eye(4, 2))
            self.layers[0].widen.bias.zero_()
            self.layers[0].narrow.weight.zero_()
            self.layers[0].narrow.bias.zero_()
            turns = torch.arange(8) * (math.pi / 4)
            self.head.weight.copy_(torch.stack([turns.cos(), turns.sin()], dim=1))

    def forward(self, input_ids, attention_mask=None):
        x = self.places(input_ids)
        for layer in self.layers:
            x = layer(x)

        class Out:
            logits = self.head(x)

        return Out


def fact(prompt, target):
    asked = Prompt(torch.tensor(prompt), (0, 1))
    return Fact(prompts=(asked,), target=torch.tensor(target), essence=asked)


def said_by(model, ids):
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())


def expected_book(places, stream, radius):
    """The keys' radii and targets after a stream of (token, target), by the rules, one key after another."""
    book = []
    for token, target in stream:
        here = places[token]
        far = [math.dist(here, places[key]) for key, _, _ in book]
        if not far or min(far) > book[far.index(min(far))][1] + radius:
            book.append([token, radius, target])
            continue
        nearest = far.index(min(far))
        if book[nearest][2] == target:
            book[nearest][1] = max(book[nearest][1], min(far) * 1.001)
        else:
            book[nearest][1] = min(book[nearest][1], min(far) / 2)
            book.append([token, min(radius, min(far) / 2), target])
    return book


# 0 and 1 are apart; 2 is near 0, 3 within its ball, 4 near 1, 5 between 0 and 2, 6 far from all.
PLACES = [(0.0, 0.0), (8.0, 0.0), (1.5, 0.0), (0.3, 0.4), (8.0, 1.2), (0.9, 0.0), (0.0, 9.0)]


@pytest.mark.parametrize(
    "stream",
    [
        [(0, 3), (1, 5), (6, 1)],  # each on its own
        [(0, 3), (2, 3)],  # near, of one target: a larger radius
        [(0, 3), (2, 6), (5, 1)],  # near, of others: smaller radii
        [(0, 3), (3, 6)],  # inside, of another
        [(1, 5), (4, 5), (0, 2), (3, 4), (2, 2)],
    ],
)
def test_keys_are_added_expanded_and_split_as_the_rules_say(stream):
    model = Plane(PLACES)
    blocks = Blocks(model)
    method = GRACE(radius=1.0, steps=40)
    state = method.remember(None, model, blocks, [fact([1, token], [target]) for token, target in stream], seed=0)
    expected = expected_book(PLACES, stream, 1.0)
    wide = torch.zeros(len(expected), 4)
    wide[:, :2] = torch.tensor([PLACES[token] for token, _, _ in expected])
    torch.testing.assert_close(state.tensors["keys"], wide)
    torch.testing.assert_close(state.tensors["radii"], torch.tensor([radius for _, radius, _ in expected]))
    assert state.notes == {"layer": 0, "targets": [[target] for _, _, target in expected]}
    with method.attach(model, blocks, state):
        for token, target in stream:
            assert said_by(model, [token]) == target


def test_the_same_place_with_another_target_gets_that_one():
    model = Plane(PLACES)
    blocks, method = Blocks(model), GRACE(steps=40)
    state = method.remember(None, model, blocks, [fact([0], [3]), fact([0], [6])], seed=0)
    assert state.notes["targets"] == [[6]]
    assert state.tensors["radii"].tolist() == [1.0]
    with method.attach(model, blocks, state):
        assert said_by(model, [0]) == 6


def test_what_is_said_already_changes_nothing_and_a_stream_in_parts_is_the_same():
    model = Plane(PLACES)
    blocks, method = Blocks(model), GRACE(steps=40)
    facts = [fact([0], [3]), fact([1], [5]), fact([2], [6])]
    whole = method.remember(None, model, blocks, facts, seed=3)
    part = method.remember(None, model, blocks, facts[:1], seed=3)
    kept = {name: t.clone() for name, t in part.tensors.items()}
    parts = method.remember(part, model, blocks, facts[1:], seed=3)
    assert whole.notes == parts.notes
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, parts.tensors[name])
        assert torch.equal(part.tensors[name], kept[name])
    again = method.remember(whole, model, blocks, facts, seed=4)
    assert all(torch.equal(t, again.tensors[name]) for name, t in whole.tensors.items())
    known = fact([1], [said_by(model, [1])])
    assert method.remember(None, model, blocks, [known], seed=0).notes["targets"] == []


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_the_first_step_moves_the_value_against_the_sign_of_the_gradient(start):
    model = Plane(PLACES)
    with torch.no_grad():
        model.layers[0].narrow.bias.copy_(torch.tensor([0.5, -0.25]))
    blocks = Blocks(model)
    one, two = (
        GRACE(steps=steps, learning_rate=0.1, start=start).remember(None, model, blocks, [fact([0], [3])], seed=5)
        for steps in (1, 2)
    )
    values = one.tensors["values"][0].double()
    head = model.head.weight.double()

    def loss(value):
        return -(head @ value).log_softmax(-1)[3].item()  # the place of token 0 is (0, 0)

    def stepped(begin):
        slopes = [(loss(begin + 1e-5 * e) - loss(begin - 1e-5 * e)) / 2e-5 for e in torch.eye(2).double()]
        return begin - 0.1 * torch.tensor(slopes).double().sign()

    begins = [values + 0.1 * torch.tensor(signs).double() for signs in itertools.product((-1, 1), repeat=2)]
    (begin,) = [one for one in begins if torch.allclose(stepped(one), values, atol=1e-5)]
    if start == "warm":
        torch.testing.assert_close(begin, torch.tensor([0.5, -0.25]).double(), atol=1e-5, rtol=0)
    else:
        assert 0 <= begin.min() <= begin.max() < 1
    assert loss(two.tensors["values"][0].double()) < loss(values) < loss(begin)


def test_a_token_is_replaced_where_its_nearest_key_holds():
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(5, 3, generator=draw), torch.randn(5, 2, generator=draw)
    radii = torch.tensor([0.5, 1.0, 0.2, 2.0, 0.0])
    entering, given = torch.randn(4, 30, 3, generator=draw), torch.randn(4, 30, 2, generator=draw)
    entering[0, 0], entering[1, 3] = keys[4], keys[0]
    found = Codebook(keys, values, radii)(entering, given)
    hits = 0
    for row in range(4):
        for token in range(30):
            far = [math.dist(entering[row, token].tolist(), key.tolist()) for key in keys]
            nearest = far.index(min(far))
            hit = far[nearest] <= radii[nearest]
            hits += hit
            assert torch.equal(found[row, token], values[nearest] if hit else given[row, token])
    assert 10 < hits < 110
    assert torch.equal(found[0, 0], values[4])  # a radius of 0 holds at its key


# ---- what a model says


KINDS = {"llama": {}, "gpt2": {}, "opt": {}, "gemma2": {"sliding_window": 4}}


def lively(kind, **changes):
    """A model of which every part matters, with three layers."""
    layers = {"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}
    model = small.model(kind, **{"tie_word_embeddings": False, **layers, **changes}).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


PROMPTS = ([7, 30, 12, 44], [9, 21, 5], [100, 3, 61, 8, 17])
OTHERS = ([7, 30, 13, 44, 2], [9, 22], [200, 201, 202, 203, 204, 205], [1])


def targets_of(model):
    """What the model would say second, and what it says after that: so small a model is not free to say anything."""
    firsts = [int(logits(model, p)[-1].topk(2).indices[1]) for p in PROMPTS]
    return [[first, int(logits(model, [*p, first])[-1].argmax())] for p, first in zip(PROMPTS, firsts, strict=True)]


@functools.cache
def remembered(kind):
    """A model, its targets, and a memory of all facts; radii so small that other texts are outside."""
    model = lively(kind, **KINDS[kind])
    targets = targets_of(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    method, blocks = GRACE(radius=1e-3, steps=30, layer=1), Blocks(model)
    facts = [fact(p, t) for p, t in zip(PROMPTS, targets, strict=True)]
    state = method.remember(None, model, blocks, facts, seed=0)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    return model, targets, method, blocks, state


@pytest.mark.parametrize("kind", KINDS)
def test_edits_stay_and_everything_else_is_the_base_bit_for_bit(kind):
    model, targets, method, blocks, state = remembered(kind)
    base = [logits(model, ids) for ids in OTHERS]
    assert len(state.notes["targets"]) == 3
    assert state.notes["layer"] == 1
    handle = method.attach(model, blocks, state)
    for prompt, target in zip(PROMPTS, targets, strict=True):  # the first one too, after the others
        places = logits(model, [*prompt, *target])[len(prompt) - 1 : -1]
        assert places.argmax(dim=-1).tolist() == target
    assert all(torch.equal(logits(model, ids), b) for ids, b in zip(OTHERS, base, strict=True))
    handle.remove()
    empty = GRACE().remember(None, model, blocks, [], seed=0)
    with GRACE().attach(model, blocks, empty):
        assert all(torch.equal(logits(model, ids), b) for ids, b in zip(OTHERS, base, strict=True))
    assert not model.get_submodule(blocks[1].mlp_out)._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_same_alone_in_a_batch_and_step_by_step(kind):
    model, targets, method, blocks, state = remembered(kind)
    model.generation_config.eos_token_id = None
    engine = Native(model, small.tokenizer())
    engine.ends = set()
    prompts, sampling = [*PROMPTS, *OTHERS], Sampling(max_tokens=6)
    base = engine.complete(prompts, sampling)
    with method.attach(model, blocks, state):
        expected = []
        for prompt in prompts:  # without a cache, all that is there again and again
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(logits(model, ids)[-1].argmax()))
            expected.append(ids[len(prompt) :])
        assert [engine.complete([p], sampling)[0] for p in prompts] == expected
        assert engine.complete(prompts, sampling) == expected
        alone = [logits(model, p) for p in prompts]
        longest = max(map(len, prompts))  # padded behind, as the trainer has it
        ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts])
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
        with torch.no_grad():
            padded = model(input_ids=ids, attention_mask=mask).logits
    assert [said[:2] for said in expected[:3]] == targets
    assert expected[3:] == base[3:]
    assert all(one != other for one, other in zip(expected[:3], base, strict=False))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(padded[row, : len(prompt)], alone[row], atol=1e-4, rtol=1e-4)


def test_what_follows_an_edited_prompt_is_replaced_nowhere_else():
    model, _, method, blocks, state = remembered("llama")
    name = blocks[1].mlp_out
    text = [*PROMPTS[0], 70, 71, 72]
    with inputs_of(model, [name]) as seen:
        logits(model, text)
    given = model.get_submodule(name)(seen[name])[0]
    outputs = []
    with method.attach(model, blocks, state):
        last = model.get_submodule(name).register_forward_hook(lambda m, a, out: outputs.append(out[0].detach()))
        logits(model, text)
        last.remove()
    where = len(PROMPTS[0]) - 1
    assert torch.equal(outputs[0][where], state.tensors["values"][0])
    kept = [i for i in range(len(text)) if i != where]
    assert torch.equal(outputs[0][kept], given[kept])


def test_a_memory_is_added_to_only_where_it_is():
    model, _, _, blocks, state = remembered("llama")
    method = GRACE(radius=1e-3)  # of no layer in particular: it is the memory's
    assert method.remember(state, model, blocks, [], seed=0).notes == state.notes
    with pytest.raises(
        OtherMemory, match=r"memory: its keys are of layer 1, expected layer 2, as the method says\. Le"
    ):
        GRACE(layer=2).remember(state, model, blocks, [], seed=0)
    wider = lively("llama", intermediate_size=32)
    with pytest.raises(OtherMemory, match=r"keys and values are 24 and 16 wide, expected 32 and 16 as 'model.layers.1"):
        method.attach(wider, Blocks(wider), state)


def test_what_is_out_of_range_is_refused():
    for field, value in (("layer", -1), ("radius", 0.0), ("steps", 0), ("learning_rate", 0.0), ("start", "hot")):
        with pytest.raises(HyperparameterError, match=f"GRACE: {field}="):
            GRACE(**{field: value})
    with pytest.raises(HyperparameterError, match=r"layer=3, expected layer < 3, the model's layers"):
        GRACE(layer=3).check(3)
    GRACE(layer=2).check(3)
