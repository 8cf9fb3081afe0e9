import math

import pytest
import torch

from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.reverse_kl import ReverseKL
from lfm.errors import HyperparameterError


def log_shares(*shape, seed):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).log_softmax(-1)


def slow(student, teacher):
    """KL(q || p), one probability after another."""
    return torch.tensor(
        [
            sum(math.exp(s) * (s - t) for s, t in zip(row, other, strict=True))
            for row, other in zip(student.tolist(), teacher.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("shape", [(1, 2), (7, 5)])
def test_it_is_the_divergence_of_the_student_from_the_teacher(shape):
    student, teacher = log_shares(*shape, seed=0), log_shares(*shape, seed=1)
    torch.testing.assert_close(ReverseKL().token_loss(student, teacher), slow(student, teacher), atol=1e-5, rtol=1e-5)


def test_it_is_the_forward_one_with_the_roles_exchanged():
    student, teacher = log_shares(4, 5, seed=0), log_shares(4, 5, seed=1)
    torch.testing.assert_close(ReverseKL().token_loss(student, teacher), ForwardKL().token_loss(teacher, student))


def test_equal_models_give_zero():
    student = log_shares(4, 6, seed=0)
    torch.testing.assert_close(ReverseKL().token_loss(student, student), torch.zeros(4))


def test_following_its_gradient_it_picks_one_of_two_peaks_where_the_forward_one_covers_both():
    teacher = torch.tensor([[0.49, 0.01, 0.01, 0.49]]).log()
    places = torch.arange(4.0)

    def bell(centre, width):  # a student that can have one peak only
        return (-((places - centre) ** 2) / width.exp())[None].log_softmax(-1)

    found = {}
    for method in (ForwardKL(), ReverseKL()):
        centre, width = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        optimizer = torch.optim.Adam([centre, width], lr=0.1)
        for _ in range(150):
            optimizer.zero_grad()
            method.token_loss(bell(centre, width), teacher).sum().backward()
            optimizer.step()
        found[type(method)] = bell(centre, width)[0].exp().detach()
    assert found[ReverseKL].max() > 0.9
    assert found[ForwardKL][0] == pytest.approx(found[ForwardKL][3].item(), abs=0.05)


def test_the_student_writes_all_text_unless_told_otherwise():
    assert ReverseKL().student_share == 1
    assert ForwardKL().student_share == 0


@pytest.mark.parametrize("field", [{"student_share": 1.5}, {"student_share": -0.1}, {"temperature": 0.0}])
def test_what_is_out_of_range_is_refused(field):
    with pytest.raises(HyperparameterError, match=f"{next(iter(field))}="):
        ReverseKL(**field)
