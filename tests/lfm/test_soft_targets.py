import math

import pytest
import torch

from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.jsd import JSD
from lfm.distillation.reverse_kl import ReverseKL
from lfm.soft_targets import Dense, TopK, chunked_distillation, grouped, likeliest

TOKENS, VOCABULARY = 23, 11
METHODS = [ForwardKL(temperature=2.0), ReverseKL(temperature=0.7), JSD(beta=0.3)]


def drawn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def student_of(dtype=torch.float32, *, tokens=TOKENS, vocabulary=VOCABULARY, width=6):
    shapes = ((tokens, width), (vocabulary, width), (vocabulary,))
    return [drawn(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def teacher_of(method, dtype=torch.float32, *, tokens=TOKENS, vocabulary=VOCABULARY, width=9, shaped=None):
    shapes = ((tokens, width), (vocabulary, width), (vocabulary,))
    hidden, weight, bias = [drawn(*shape, seed=i + 7, dtype=dtype) for i, shape in enumerate(shapes)]
    return Dense(hidden=hidden, weight=weight, bias=bias, temperature=method.temperature, shaped=shaped)


def capped(logits):
    return 5 * torch.tanh(logits / 5)


def logits_of(hidden, weight, bias, shaped=None):
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return shaped(logits) if shaped else logits


def dense(method, student, teacher, *, targets=None, hard_weight=0.0, shaped=None):
    """The same with both full logits."""
    said = logits_of(teacher.hidden, teacher.weight, teacher.bias, teacher.shaped)
    both = [(x / method.temperature).log_softmax(-1) for x in (logits_of(*student, shaped), said)]
    soft = method.token_loss(*both).sum()
    if not hard_weight:
        return soft
    hard = torch.nn.functional.cross_entropy(logits_of(*student, shaped), targets, reduction="sum")
    return (1 - hard_weight) * soft + hard_weight * hard


def run(method, student, teacher, **more):
    hidden, weight, bias = student
    return chunked_distillation(hidden, weight, teacher, method, bias=bias, **more)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [None, 1, 5, TOKENS])
@pytest.mark.parametrize("shaped", [None, capped])
def test_value_and_gradients_are_those_of_the_whole(method, chunk, shaped):
    student, teacher = student_of(), teacher_of(method, shaped=shaped)
    got = run(method, student, teacher, chunk=chunk, shaped=shaped)
    wanted = dense(method, student, teacher, shaped=shaped)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(wanted, student))


@pytest.mark.parametrize("hard_weight", [0.25, 1.0])
def test_hard_labels_are_mixed_in_by_their_share(hard_weight):
    method, targets = METHODS[0], torch.arange(TOKENS) % VOCABULARY
    student, teacher = student_of(), teacher_of(method)
    got = run(method, student, teacher, targets=targets, hard_weight=hard_weight, chunk=5)
    wanted = dense(method, student, teacher, targets=targets, hard_weight=hard_weight)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(wanted, student))


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_the_loss_is_float32_and_gradients_are_near(method):
    student, teacher = student_of(torch.bfloat16), teacher_of(method, torch.bfloat16)
    got = run(method, student, teacher, chunk=4)
    whole = [x.detach().float().requires_grad_() for x in student]
    wanted = dense(method, whole, teacher)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted.item(), rel=0.02)
    pairs = zip(torch.autograd.grad(got, student), torch.autograd.grad(wanted, whole), strict=True)
    for one, other in pairs:
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() < 0.03 * other.norm()


def test_no_gradient_reaches_the_teacher():
    method, student = METHODS[2], student_of()
    teacher = teacher_of(method)
    for leaf in (teacher.hidden, teacher.weight, teacher.bias):
        leaf.requires_grad_()
    run(method, student, teacher, chunk=4).backward()
    assert [x.grad for x in (teacher.hidden, teacher.weight, teacher.bias)] == [None] * 3


@pytest.mark.parametrize("top_k", [None, 3])
def test_nothing_is_as_large_as_all_logits(top_k, largest_tensor):
    method, tokens, vocabulary, chunk = METHODS[2], 96, 64, 4
    sizes = {"tokens": tokens, "vocabulary": vocabulary}
    student, teacher = student_of(**sizes), teacher_of(method, **sizes)
    with largest_tensor() as largest:
        said = teacher if top_k is None else likeliest(teacher, top_k, vocabulary, chunk=chunk)
        run(method, student, said, chunk=chunk).backward()
    assert largest.numel <= max(chunk * vocabulary, tokens * 9, vocabulary * 9)
    with largest_tensor() as largest:
        dense(method, student_of(**sizes), teacher).backward()
    assert largest.numel == tokens * vocabulary


def slow_groups(row, tokens):
    """The probabilities of `tokens`, and of everything else together."""
    weights = [math.exp(x) for x in row]
    named = [weights[t] / sum(weights) for t in tokens]
    return [*named, sum(w for i, w in enumerate(weights) if i not in tokens) / sum(weights)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [None, 5])
def test_the_likeliest_tokens_and_one_outcome_for_the_rest_are_compared(method, chunk):
    student, teacher = student_of(), teacher_of(method)
    said = likeliest(teacher, 3, VOCABULARY, chunk=chunk)
    t_logits = (logits_of(teacher.hidden, teacher.weight, teacher.bias) / method.temperature).tolist()
    s_logits = (logits_of(*student) / method.temperature).tolist()
    wanted = 0.0
    for s, t in zip(s_logits, t_logits, strict=True):
        tokens = sorted(range(VOCABULARY), key=lambda v, t=t: -t[v])[:3]
        q, p = (torch.tensor([slow_groups(x, tokens)]).log() for x in (s, t))
        wanted += method.token_loss(q, p).item()
    assert run(method, student, said, chunk=chunk).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_all_tokens_as_the_likeliest_are_the_dense_loss(method):
    student, teacher = student_of(), teacher_of(method)
    got = run(method, student, likeliest(teacher, VOCABULARY, VOCABULARY), chunk=5)
    wanted = dense(method, student, teacher)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(wanted, student))


def test_what_is_left_over_keeps_its_size_and_gradient_where_it_is_tiny():
    logits = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    shares = grouped(logits, torch.tensor([[0]]), others=True)
    assert shares[0, 1].item() == pytest.approx(math.log(2 / (math.exp(30) + 2)), rel=1e-6)
    shares[0, 1].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0.5, 0.5]]))


def test_rounded_log_probabilities_sum_to_one_again():
    said = TopK(torch.tensor([[1, 0]]), torch.tensor([[-0.3, -2.0, -3.0]], dtype=torch.float16), 4, 1.0)
    _, teacher = said.compare(torch.zeros(1, 4), slice(0, 1))
    assert float(teacher.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize("top_k", [None, 3])
def test_padding_of_either_head_is_left_out(top_k):
    method = METHODS[0]
    student, teacher = student_of(vocabulary=VOCABULARY + 4), teacher_of(method)
    narrow = [student[0], student[1][:VOCABULARY], student[2][:VOCABULARY]]
    said = teacher if top_k is None else likeliest(teacher, top_k, VOCABULARY)
    torch.testing.assert_close(run(method, student, said, chunk=5), run(method, narrow, said, chunk=5))
    wide = teacher_of(method, vocabulary=VOCABULARY + 2)
    cut = Dense(
        hidden=wide.hidden, weight=wide.weight[:VOCABULARY], bias=wide.bias[:VOCABULARY], temperature=wide.temperature
    )
    said, kept = (x if top_k is None else likeliest(x, top_k, VOCABULARY) for x in (wide, cut))
    torch.testing.assert_close(run(method, student_of(), said), run(method, student_of(), kept))
