"""What every distillation method keeps, by being a file of the family."""

import pickle

import pytest
import torch

from tests.lfm.variants import every

METHODS = pytest.mark.parametrize("method", every("distillation"))
NO_DIVERGENCE = frozenset({"SequenceLevel"})  # names of classes whose loss is not 0 where both say the same


@pytest.fixture
def said():
    """What student and teacher say of some tokens, the student with a gradient."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 11, 6, generator=draw) * 3
    return student.requires_grad_(), teacher.log_softmax(-1)


@METHODS
def test_each_token_has_a_value_of_its_own_and_nothing_else_changes(method, said):
    student, teacher = said[0].log_softmax(-1), said[1]
    before = student.detach().clone(), teacher.clone()
    loss = method.token_loss(student, teacher)
    assert (loss.shape, loss.dtype) == ((11,), torch.float32)
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])
    parts = [method.token_loss(student[i : i + 4], teacher[i : i + 4]) for i in range(0, 11, 4)]
    torch.testing.assert_close(torch.cat(parts), loss)
    order = torch.arange(11).flip(0)
    torch.testing.assert_close(method.token_loss(student[order], teacher[order]), loss[order])


@METHODS
def test_its_gradient_is_finite_and_that_of_finite_differences(method, said):
    logits, teacher = said[0].detach().double().requires_grad_(), said[1].double()

    def loss(values):
        return method.token_loss(values.log_softmax(-1), teacher).sum()

    assert torch.autograd.gradcheck(loss, (logits,))
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert gradient.isfinite().all()
    far = torch.tensor([[-80.0, 0.0, 40.0, -60.0, 5.0, 9.0]], requires_grad=True)
    method.token_loss(far.log_softmax(-1), far.detach().flip(-1).log_softmax(-1)).sum().backward()
    assert far.grad.isfinite().all()


@METHODS
def test_a_divergence_is_zero_where_both_say_the_same_and_above_elsewhere(method, said):
    if type(method).__name__ in NO_DIVERGENCE:
        pytest.skip("it is none")
    student, teacher = said[0], said[1]
    assert (method.token_loss(student.log_softmax(-1), teacher) > 0).all()
    equal = teacher.clone().requires_grad_()
    loss = method.token_loss(equal.log_softmax(-1), teacher)
    torch.testing.assert_close(loss, torch.zeros(11), rtol=0, atol=1e-5)
    loss.sum().backward()
    torch.testing.assert_close(equal.grad, torch.zeros(11, 6), rtol=0, atol=1e-5)


@METHODS
def test_it_gives_the_same_again_and_in_another_process(method, said):
    student = said[0].detach().log_softmax(-1)
    first = method.token_loss(student, said[1])
    torch.manual_seed(12345)
    drawn = torch.get_rng_state()
    assert torch.equal(pickle.loads(pickle.dumps(method)).token_loss(student, said[1]), first)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert 0 <= method.student_share <= 1
    assert method.temperature > 0
