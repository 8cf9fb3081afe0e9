import math

import pytest
import torch

from lfm.chunks import chunked_cross_entropy
from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.sequence_level import SequenceLevel
from lfm.soft_targets import TopK, chunked_distillation


def test_it_is_the_cross_entropy_between_the_teacher_and_the_student():
    student, teacher = (torch.randn(5, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    for got, q, p in zip(SequenceLevel().token_loss(student, teacher), student, teacher, strict=True):
        assert got.item() == pytest.approx(-sum(math.exp(b) * a for a, b in zip(q.tolist(), p.tolist(), strict=True)))


def test_of_a_teacher_that_is_sure_it_is_the_forward_kl():
    """The entropy of one certain token is 0, so that both differ by nothing."""
    student = torch.randn(3, 4, dtype=torch.float64).log_softmax(-1)
    sure = torch.full((3, 4), -1e9, dtype=torch.float64)
    sure[range(3), [2, 0, 1]] = 0
    got = SequenceLevel().token_loss(student, sure)
    torch.testing.assert_close(got, ForwardKL().token_loss(student, sure))
    torch.testing.assert_close(got, -student[range(3), [2, 0, 1]])


def test_on_one_certain_token_it_has_the_loss_and_the_gradient_of_plain_tuning():
    torch.manual_seed(0)
    targets = torch.tensor([3, 0, 8, 8, 1])
    sure = torch.tensor([0.0, float("-inf")]).expand(5, 2)
    found = []
    for spoken in (True, False):
        hidden, weight = (t.requires_grad_() for t in (torch.linspace(-1, 1, 20).view(5, 4), torch.eye(9, 4) * 2))
        if spoken:
            said = TopK(targets[:, None], sure, 9, 1.0)
            loss = chunked_distillation(hidden, weight, said, SequenceLevel(), chunk=2)
        else:
            loss = chunked_cross_entropy(hidden, weight, targets)
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*found)


def test_it_asks_for_nothing_but_text():
    assert SequenceLevel().needs.access == "text"
    assert (SequenceLevel().answers, SequenceLevel().student_share) == ("teacher", 0.0)
