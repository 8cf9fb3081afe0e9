import math

import pytest
import torch

from lfm.deltas import applied
from lfm.editing.base import TOKENS, EditError, Fact, Prompt
from lfm.editing.rome import ROME, inserted
from lfm.errors import HyperparameterError
from lfm.hooks import Blocks, inputs_of
from tests.operators import small

pytestmark = pytest.mark.slow

KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3", "gpt2", "gpt_neox", "opt"]
# Tiny networks say little at a single token, so that the paper's limits on what may be said would keep them silent.
FREE = {"layer": 0, "learning_rate": 0.1, "weight_decay": 0.0, "clamp": 100.0, "kl_weight": 0.0, "tokens_per_width": 10}


def prompt(ids, begin, end):
    return Prompt(torch.tensor(ids), (begin, end))


ALONE = Fact([prompt([5, 6, 7, 8], 1, 3)], torch.tensor([20, 21]), prompt([6, 7, 30, 31], 0, 2))
# These end with their subject, so that a network that was never trained can say the target from there.
LAST = Fact(
    [prompt([5, 6, 7, 8], 2, 4), prompt([9, 11, 5, 6, 7, 8], 4, 6)], torch.tensor([20]), prompt([7, 8, 30, 31], 0, 2)
)
AFTER = Fact([*ALONE.prompts, prompt([9, 11, 5, 6, 7, 8], 3, 5)], ALONE.target, ALONE.essence)
OTHER = Fact([prompt([5, 40, 41], 1, 3)], torch.tensor([60]), prompt([40, 41, 30], 0, 2))


def keys_of(model, name, ids):
    with torch.no_grad(), inputs_of(model, [name]) as seen:
        model(input_ids=ids)
    return seen[name].reshape(*ids.shape, -1)


def measured(model, name):
    ids = torch.randint(1, small.VOCABULARY, (40, 30), generator=torch.Generator().manual_seed(0))
    keys = keys_of(model, name, ids).flatten(0, 1)
    return {f"gram/{name}": keys.T @ keys, TOKENS: torch.tensor(float(len(keys)))}


@pytest.fixture(scope="module")
def llama():
    return opened("llama")


def opened(kind):
    model = small.model(kind, **({"mlp_bias": True} if kind == "llama" else {})).eval()
    blocks = Blocks(model)
    return model, blocks, blocks[0].mlp_out, measured(model, blocks[0].mlp_out)


def solved(there, facts, **fields):
    model, blocks, name, statistics = there
    delta = ROME(**{**FREE, **fields}).solve(model, blocks, facts, statistics=statistics, editor=None)
    assert list(delta) == [f"{name}.weight"]
    return delta


def added(there, delta):
    """The change as (out, in)."""
    _, blocks, name, _ = there
    whole = delta[f"{name}.weight"].whole()
    return whole.T if blocks.transposed(name) else whole


def likelihood(model, fact, number=0):
    asked = fact.prompts[number].ids.tolist()
    found = 0.0
    for token in fact.target.tolist():
        with torch.no_grad():
            said = model(input_ids=torch.tensor([asked])).logits[0, -1].log_softmax(-1)
        found += float(said[token])
        asked.append(token)
    return found / len(fact.target)


def slow(there, fact, method):
    """Prompt by prompt, without padding, the module's own `forward` overwritten."""
    model, blocks, name, statistics = there
    module, released = blocks.module(name), method.convention == "released"
    keys = [keys_of(model, name, p.ids[None])[0, p.subject[1] - 1] for p in fact.prompts]
    mean = sum(keys) / len(keys)
    with torch.no_grad():
        start = module((keys[0] if released else mean)[None])[0]
    change = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=method.learning_rate)
    forward = module.forward

    def said(ids, place, at, patched=True):
        def put(x):
            out = forward(x)
            rows = [out.reshape(len(ids), -1)[i] for i in range(len(ids))]
            rows[place] = rows[place] + change if released else start + change
            return torch.stack(rows).reshape(out.shape)

        module.forward = put if patched else forward
        try:
            return model(input_ids=ids[None]).logits[0, at].log_softmax(-1)
        finally:
            module.forward = forward

    essence = fact.essence
    at = essence.subject[1] - 1 if released else len(essence.ids) - 1
    before = said(essence.ids, essence.subject[1] - 1, at, patched=False).detach()
    for _ in range(method.steps):
        loss = method.weight_decay * change.norm() / start.norm() ** 2
        for p in fact.prompts:
            ids = torch.cat([p.ids, fact.target[:-1]])
            for i, token in enumerate(fact.target):
                likely = said(ids, p.subject[1] - 1, len(p.ids) - 1 + i)[token]
                loss = loss - likely / len(fact.target) / len(fact.prompts)
        now = said(essence.ids, essence.subject[1] - 1, at)
        for i in range(len(now)):
            loss = loss + method.kl_weight * now[i].exp() * (now[i] - before[i])
        (change.grad,) = torch.autograd.grad(loss, [change])
        optimizer.step()
        with torch.no_grad():
            if change.norm() > method.clamp * start.norm():
                change.mul_(method.clamp * start.norm() / change.norm())
    moment = statistics[f"gram/{name}"].double() / statistics[TOKENS].double()
    moment += method.ridge * moment.trace() / len(moment) * torch.eye(len(moment))
    direction = moment.inverse() @ mean.double()
    divisor = sum(float(a) * float(b) for a, b in zip(direction, keys[0] if released else mean, strict=True))
    return torch.tensor([[float(c) * float(d) / divisor for d in direction] for c in change.detach()])


@pytest.mark.parametrize("convention", ["paper", "released"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rome_agrees_with_a_slow_version(kind, convention):
    there = opened(kind)
    fields = {"convention": convention, "steps": 3, "weight_decay": 0.01, "kl_weight": 2.0, "clamp": 5.0, "ridge": 0.1}
    delta = solved(there, [AFTER], **fields)
    expected = slow(there, AFTER, ROME(**{**FREE, **fields}))
    torch.testing.assert_close(added(there, delta), expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_model_maps_the_key_that_it_has_itself_to_what_was_learnt(kind):
    there = opened(kind)
    model, blocks, name, _ = there
    delta = solved(there, [LAST])
    change = delta[f"{name}.weight"].right[0] if blocks.transposed(name) else delta[f"{name}.weight"].left[:, 0]
    before = [likelihood(model, LAST, i) for i in range(2)]
    keys = [keys_of(model, name, p.ids[None])[0, p.subject[1] - 1] for p in LAST.prompts]
    key = (keys[0] + keys[1]) / 2
    with torch.no_grad():
        start = blocks.module(name)(key[None])[0]
        with applied(model, delta):
            same = [keys_of(model, name, p.ids[None])[0, p.subject[1] - 1] for p in LAST.prompts]
            torch.testing.assert_close(torch.stack(same), torch.stack(keys))
            torch.testing.assert_close(blocks.module(name)(key[None])[0], start + change, rtol=1e-4, atol=1e-5)
            after = [likelihood(model, LAST, i) for i in range(2)]
    assert change.norm() > 0.1
    assert all(a > b + 0.1 for a, b in zip(after, before, strict=True))


def test_the_change_has_rank_one_and_disturbs_nothing_that_has_no_part_in_the_key(llama):
    model, _, name, statistics = llama
    whole = added(llama, solved(llama, [AFTER])).double()
    values = torch.linalg.svdvals(whole)
    assert values[0] > 1e-2
    assert values[1] < 1e-6 * values[0]
    keys = [keys_of(model, name, p.ids[None])[0, p.subject[1] - 1] for p in AFTER.prompts]
    key = ((keys[0] + keys[1]) / 2).double()
    moment = statistics[f"gram/{name}"].double()
    draw = torch.randn(5, *whole.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    for other in draw:
        other = other - (other @ key)[:, None] * key / (key @ key)  # other @ key == 0
        product = (whole @ moment * other).sum()
        assert abs(product) < 1e-5 * (whole @ moment).norm() * other.norm()


def test_of_all_changes_that_map_the_key_to_the_value_it_moves_ordinary_text_least():
    draw = torch.Generator().manual_seed(2)
    keys = torch.randn(200, 6, generator=draw, dtype=torch.double) * torch.arange(1, 7)
    moment = keys.T @ keys / 200
    key, change = torch.randn(6, generator=draw).double(), torch.randn(4, generator=draw).double()
    best = inserted(change, key, key, factor=torch.linalg.cholesky(moment))
    torch.testing.assert_close(best.left @ best.right @ key, change)
    cost = ((best.left @ best.right @ keys.T) ** 2).sum()
    for _ in range(20):
        other = torch.randn(4, 6, generator=draw, dtype=torch.double) * 0.1
        other = other - (other @ key)[:, None] * key / (key @ key)
        moved = best.left @ best.right + other
        torch.testing.assert_close(moved @ key, change)
        assert ((moved @ keys.T) ** 2).sum() > cost


def test_the_released_code_maps_the_bare_prompts_key_to_the_value_but_not_the_mean_key(llama):
    model, _, name, _ = llama
    delta = solved(llama, [AFTER], convention="released")
    change, whole = delta[f"{name}.weight"].left[:, 0], added(llama, delta)
    keys = [keys_of(model, name, p.ids[None])[0, p.subject[1] - 1] for p in AFTER.prompts]
    torch.testing.assert_close(whole @ keys[0], change, rtol=1e-4, atol=1e-5)
    assert (whole @ (keys[0] + keys[1]) / 2 - change).norm() > 0.05 * change.norm()


def test_without_other_texts_both_conventions_write_under_the_same_key(llama):
    one = added(llama, solved(llama, [ALONE]))
    other = added(llama, solved(llama, [ALONE], convention="released"))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_several_facts_are_written_one_after_the_other(llama):
    model, _, name, _ = llama
    both = solved(llama, [LAST, OTHER])
    first = solved(llama, [LAST])
    with applied(model, first):
        second = solved(llama, [OTHER])
    torch.testing.assert_close(added(llama, both), added(llama, first) + added(llama, second), rtol=1e-4, atol=1e-5)
    assert both[f"{name}.weight"].left.shape[1] == 2
    before = likelihood(model, LAST), likelihood(model, OTHER)
    with applied(model, both):
        after = likelihood(model, LAST), likelihood(model, OTHER)
    assert after[0] > before[0] + 0.1
    assert after[1] > before[1] + 0.1
    assert solved_nothing(llama) == {}


def solved_nothing(there):
    model, blocks, _, statistics = there
    return ROME(**FREE).solve(model, blocks, [], statistics=statistics, editor=None)


def test_what_follows_the_essence_stays_where_that_weighs_much(llama):
    model, _, _, _ = llama

    def moved(**fields):
        with torch.no_grad():
            before = model(input_ids=ALONE.essence.ids[None]).logits[0, -1].log_softmax(-1)
            with applied(model, solved(llama, [ALONE], **fields)):
                after = model(input_ids=ALONE.essence.ids[None]).logits[0, -1].log_softmax(-1)
        return float((after.exp() * (after - before)).sum())

    assert moved(kl_weight=100.0) < 0.5 * moved(kl_weight=0.0)


def test_the_value_stays_near_its_start(llama):
    _, blocks, name, _ = llama
    loose, tight = (solved(llama, [ALONE], clamp=c)[f"{name}.weight"].left[:, 0].norm() for c in (100.0, 0.5))
    key = keys_of(llama[0], name, ALONE.prompts[0].ids[None])[0, 2]
    with torch.no_grad():
        start = blocks.module(name)(key[None])[0]
    torch.testing.assert_close(tight, 0.5 * start.norm())
    assert loose > 2 * tight
    light = solved(llama, [ALONE], weight_decay=1.0)[f"{name}.weight"].left[:, 0].norm()
    assert light < loose


def test_nothing_of_the_model_is_different_afterwards(llama):
    model = llama[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    solved(llama, [AFTER, OTHER])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_default_layer_is_as_deep_as_the_papers():
    model = small.model("gpt2", n_layer=9)
    blocks = Blocks(model)
    assert ROME()._written(blocks) == blocks[3].mlp_out
    assert ROME(layer=8)._written(blocks) == blocks[8].mlp_out
    with pytest.raises(HyperparameterError, match=r"ROME: layer=9, expected 0 <= layer < 9, the model's layers\."):
        ROME(layer=9)._written(blocks)


def test_statistics_are_judged(llama):
    _, blocks, name, statistics = llama
    moment = statistics[f"gram/{name}"].double()
    values = torch.linalg.eigvalsh(moment)
    found = ROME(**FREE).judged(blocks, statistics)
    assert found["condition"] == pytest.approx(float(values[-1] / values[0]))
    assert found["tokens_per_width"] == 1200 / 24
    even = ROME(**FREE, ridge=1.0).judged(blocks, statistics)["condition"]
    mean = float(values.mean())
    assert even == pytest.approx(float((values[-1] + mean) / (values[0] + mean)))
    flat = {f"gram/{name}": torch.zeros(24, 24), TOKENS: torch.tensor(1e6)}
    assert math.isinf(ROME(**FREE).judged(blocks, flat)["condition"])


def test_what_cannot_be_done_is_refused(llama):
    model, blocks, name, statistics = llama

    def refused(match, statistics=statistics, facts=(ALONE,), **fields):
        with pytest.raises(EditError, match=match):
            ROME(**{**FREE, **fields}).solve(model, blocks, facts, statistics=statistics, editor=None)

    refused(rf"ROME: no statistics of '{name}', expected the second moment of what goes into it\. Measure 'gram'", {})
    wanted = r"ROME: statistics of 1200 tokens for keys of width 24, expected at least 60 times the width\. Measure"
    refused(wanted, tokens_per_width=60)
    flat = {f"gram/{name}": torch.zeros(24, 24), TOKENS: torch.tensor(1e6)}
    refused(r"ROME: the second moment of the keys has no inverse, expected one that has\.", flat)
    error = EditError("ROME", "a", "b", "c")
    assert str(EditError(*error.args)) == str(error) == "ROME: a, expected b. c"


def test_a_layer_without_anything_at_the_subject_is_refused():
    there = opened("opt")
    _, blocks, name, _ = there
    with torch.no_grad():
        blocks.module(blocks[0].mlp_in[0]).bias.fill_(-100.0)  # no unit of it is ever active
    with pytest.raises(EditError, match=rf"nothing goes into '{name}' at the subject's last token"):
        solved(there, [ALONE])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", -1), ("steps", 0), ("learning_rate", 0.0), ("weight_decay", -1.0), ("clamp", 0.0),
        ("kl_weight", -1.0), ("ridge", -1.0), ("tokens_per_width", -1.0), ("convention", "mixed"),
    ],
)  # fmt: skip
def test_a_field_out_of_range_is_refused(field, value):
    with pytest.raises(HyperparameterError, match=rf"ROME: {field}="):
        ROME(**{field: value})
