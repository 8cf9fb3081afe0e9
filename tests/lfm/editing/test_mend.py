"""MEND, against loops over tokens and against what autograd says."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from lfm.deltas import applied
from lfm.editing.base import EditError, Fact, Lesson, Prompt
from lfm.editing.mend import MEND, factors
from lfm.errors import HyperparameterError
from lfm.hooks import Blocks
from tests.operators import small

pytestmark = pytest.mark.slow

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3", "gpt2", "gpt_neox", "opt")
PLAIN = MEND(num_blocks=2, rank=4, normalised=False)


def fact(asked=(5, 6, 7, 8), target=(9, 10)):
    prompt = Prompt(torch.tensor(asked), (0, 1))
    return Fact(prompts=(prompt,), target=torch.tensor(target), essence=prompt)


def lesson(told):
    others = torch.tensor([[20, 21, 22, 23, 24, 0, 0]])
    return Lesson(told, torch.tensor([30, 6, 8]), told.target, others, torch.tensor([[1, 1, 1, 1, 0, 0, 0]]).bool())


def made(kind="llama"):
    model = small.model(kind).eval().requires_grad_(False)
    return model, Blocks(model)


def trained(method, model, blocks, *, seed=3):
    """An editor that is nothing like what it begins as."""
    editor = method.build(model, blocks)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in editor.networks.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
        editor.rates.mul_(torch.rand(editor.rates.shape, generator=draw) + 0.5)
    return editor


def fact_loss(model, told):
    ids = torch.cat([told.prompts[0].ids, told.target])[None]
    return F.cross_entropy(model(input_ids=ids).logits[0, -len(told.target) - 1 : -1], told.target)


def solved(method, model, blocks, facts, editor):
    return method.solve(model, blocks, facts, statistics={}, editor=editor)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_and_not_normalised_it_is_one_step_of_gradient_descent(kind):
    model, blocks = made(kind)
    delta = solved(PLAIN, model, blocks, [fact()], PLAIN.build(model, blocks))
    model.requires_grad_(True)
    wanted = torch.autograd.grad(fact_loss(model, fact()), [model.get_parameter(n) for n in delta])
    assert len(delta) == (6 if kind in KINDS[:6] else 4)
    for change, gradient in zip(delta.values(), wanted, strict=True):
        torch.testing.assert_close(change.whole(), -1e-4 * gradient, rtol=1e-4, atol=1e-9)


def test_the_released_code_goes_the_other_way():
    model, blocks = made()
    other = MEND(num_blocks=2, rank=4, normalised=False, convention="released")
    paper = solved(PLAIN, model, blocks, [fact()], PLAIN.build(model, blocks))
    released = solved(other, model, blocks, [fact()], other.build(model, blocks))
    for name, change in paper.items():
        torch.testing.assert_close(released[name].whole(), -change.whole())
    assert other.build(model, blocks).networks["16x24"].layers[0].V.abs().max() > 1.1
    assert PLAIN.build(model, blocks).networks["16x24"].layers[0].V.abs().max() <= math.sqrt(6 / (4 + 40))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("num_hidden", [0, 1, 2])
def test_the_networks_are_what_the_equations_say_token_by_token(kind, num_hidden):
    model, blocks = made(kind)
    method = MEND(num_blocks=2, rank=3, num_hidden=num_hidden, rate=0.02, rate_speed=7.0)
    editor = trained(method, model, blocks)
    method.observe(editor, model, blocks, [fact(), fact((11, 12, 13), (14, 15, 16))])
    delta = solved(method, model, blocks, [fact()], editor)
    for i, (name, (u, d)) in enumerate(factors(model, editor.names, fact()).items()):
        key = f"{u.shape[1]}x{d.shape[1]}"
        alike = [n for n in editor.names if shape(model, blocks, n) == key]
        wanted = torch.zeros(u.shape[1], d.shape[1])
        for t in range(len(u)):
            z = token(editor.networks[key], torch.cat([u[t], d[t]]), alike.index(name))
            for row in range(u.shape[1]):
                wanted[row] -= 7.0 * editor.rates[i].item() * z[row] * z[u.shape[1] :]
        got = delta[name].whole()
        torch.testing.assert_close(got if kind == "gpt2" else got.T, wanted, rtol=1e-3, atol=1e-6)


def shape(model, blocks, name):
    rows, columns = model.get_parameter(name).shape
    return f"{rows}x{columns}" if blocks.transposed(name.removesuffix(".weight")) else f"{columns}x{rows}"


@torch.no_grad()
def token(network, z, number):
    """One token through a network, number by number."""
    mean = network.total / network.count
    variance = (network.squares - network.count * mean**2) / (network.count - 1)
    z = [(float(z[i]) - float(mean[i])) / (math.sqrt(float(variance[i])) + 1e-7) for i in range(len(z))]
    for layer in network.layers:
        narrow = [sum(float(v) * x for v, x in zip(row, z, strict=True)) for row in layer.V]
        inner = [sum(float(u) * x for u, x in zip(row, narrow, strict=True)) for row in layer.U]
        scale, shift = layer.scale[number], layer.shift[number]
        after = [float(scale[i]) * (inner[i] + float(layer.bias[i])) + float(shift[i]) for i in range(len(z))]
        z = [x + max(0.0, a) for x, a in zip(z, after, strict=True)]
    return torch.tensor(z)


def test_what_is_normalised_has_mean_0_and_deviation_1_over_the_facts_observed():
    model, blocks = made()
    method = MEND(num_blocks=2, rank=4)
    facts = [fact(), fact((11, 12, 13), (14, 15, 16)), fact((17, 18), (19,))]
    editor, one, two = (method.build(model, blocks) for _ in range(3))
    method.observe(editor, model, blocks, facts)
    method.observe(one, model, blocks, facts[:1])
    method.observe(two, model, blocks, facts[1:])
    seen = [factors(model, editor.names, f) for f in facts]
    for key, network in editor.networks.items():
        alike = [n for n in editor.names if shape(model, blocks, n) == key]
        z = torch.cat([torch.cat(found[n], dim=-1) for found in seen for n in alike])
        assert network.count == len(z)
        normal = network.normal(z)
        moving = z.std(0) > 1e-6
        torch.testing.assert_close(normal.mean(0)[moving], torch.zeros(int(moving.sum())), atol=1e-3, rtol=0)
        torch.testing.assert_close(normal, (z - z.mean(0)) / (z.std(0) + 1e-7), atol=1e-2, rtol=1e-3)
        for name, buffer in network.named_buffers():
            added = one.networks[key].get_buffer(name) + two.networks[key].get_buffer(name)
            torch.testing.assert_close(added, buffer)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_that_of_the_model_with_the_change_in_it(kind):
    model, blocks = made(kind)
    method = MEND(num_blocks=2, rank=4, rate=0.05, edit_weight=0.3, locality_weight=2.0, normalised=False)
    editor, asked = trained(method, model, blocks), lesson(fact())
    before = model(input_ids=asked.others).logits[0].softmax(-1)
    with applied(model, solved(method, model, blocks, [asked.fact], editor)):
        said = model(input_ids=torch.tensor([[30, 6, 8, 9]])).logits[0].softmax(-1)
        after = model(input_ids=asked.others).logits[0].softmax(-1)
    answered = -(math.log(said[2, 9]) + math.log(said[3, 10])) / 2
    astray = sum((before[t] * (before[t].log() - after[t].log())).sum().item() for t in range(4)) / 4
    assert astray > 1e-3
    got = method.loss(editor, model, blocks, asked)
    assert got.item() == pytest.approx(0.3 * answered + 2.0 * astray, rel=1e-4)


def test_its_gradient_is_the_slope_of_the_loss_in_every_parameter_of_the_editor():
    model, blocks = made()
    method = MEND(num_blocks=1, rank=4, rate=0.05, normalised=False)
    editor, asked = trained(method, model, blocks), lesson(fact())
    method.loss(editor, model, blocks, asked).backward()
    for name, parameter in editor.named_parameters():
        step = 1e-4 * parameter.grad / parameter.grad.norm() ** 2  # along the gradient, far enough for float32
        with torch.no_grad():
            parameter.add_(step)
            up = method.loss(editor, model, blocks, asked)
            parameter.sub_(2 * step)
            down = method.loss(editor, model, blocks, asked)
            parameter.add_(step)
        assert (up - down).item() == pytest.approx(2e-4, rel=0.1), name


def test_the_first_step_already_learns_although_everything_begins_at_the_edge():
    model, blocks = made()
    method = MEND(num_blocks=2, rank=4)
    editor = method.build(model, blocks)
    method.observe(editor, model, blocks, [fact()])
    method.loss(editor, model, blocks, lesson(fact())).backward()
    for layer in editor.networks["16x24"].layers:
        assert layer.U.grad.abs().max() > 0
    assert len(editor.rates.grad.unique()) == len(editor.names) == 6, "each matrix has a rate of its own"


def test_rates_learn_faster_by_their_speed():
    model, blocks = made()
    method = MEND(num_blocks=2, rank=4, rate=1e-3, rate_speed=50.0, normalised=False)
    editor = method.build(model, blocks)
    assert editor.rate(editor.names[0]).item() == pytest.approx(1e-3)
    optimizer = torch.optim.AdamW(editor.parameters(), lr=1e-6, weight_decay=0.0)
    method.loss(editor, model, blocks, lesson(fact())).backward()
    optimizer.step()
    for name in editor.names:
        assert abs(editor.rate(name).item() - 1e-3) == pytest.approx(5e-5, rel=1e-2)


def test_a_change_has_no_higher_rank_than_the_edit_has_tokens():
    model, blocks = made()
    method = MEND(num_blocks=1)
    editor = trained(method, model, blocks)
    method.observe(editor, model, blocks, [fact()])
    told = fact((5, 6, 7, 8, 9, 10), (11, 12))
    for change in solved(method, model, blocks, [told], editor).values():
        # In the last block only the tokens that tell an answer token have a gradient.
        assert change.left.shape[1] == change.right.shape[0] == 2
        assert torch.linalg.matrix_rank(change.whole()) <= 2


def test_several_facts_are_what_each_would_change_alone():
    model, blocks = made()
    editor = trained(PLAIN, model, blocks)
    facts = [fact(), fact((11, 12, 13), (14,))]
    both = solved(PLAIN, model, blocks, facts, editor)
    alone = [solved(PLAIN, model, blocks, [f], editor) for f in facts]
    for name, change in both.items():
        torch.testing.assert_close(change.whole(), alone[0][name].whole() + alone[1][name].whole())


def test_nothing_of_the_model_is_different_afterwards():
    model, blocks = made()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    editor = PLAIN.build(model, blocks)
    PLAIN.loss(editor, model, blocks, lesson(fact())).backward()
    solved(PLAIN, model, blocks, [fact()], editor)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_more_blocks_than_there_are_are_refused():
    model, blocks = made()
    with pytest.raises(HyperparameterError, match=r"MEND: num_blocks=3, expected at most 2, the model's layers"):
        MEND().build(model, blocks)


def test_without_an_editor_or_with_one_that_has_observed_nothing_it_is_refused():
    model, blocks = made()
    with pytest.raises(EditError, match=r"MEND: no editor, expected one that was trained for this model"):
        solved(PLAIN, model, blocks, [fact()], None)
    method = MEND(num_blocks=2)
    with pytest.raises(EditError, match="an editor that knows no facts, expected one that has observed some"):
        solved(method, model, blocks, [fact()], method.build(model, blocks))


@pytest.mark.parametrize(
    "field", ["num_blocks", "rank", "rate", "rate_speed", "edit_weight", {"num_hidden": -1}, {"locality_weight": -1.0}]
)
def test_values_out_of_range_are_refused(field):
    with pytest.raises(HyperparameterError):
        MEND(**(field if isinstance(field, dict) else {field: 0}))
