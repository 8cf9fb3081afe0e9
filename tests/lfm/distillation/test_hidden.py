import math

import pytest
import torch

from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.hidden import Hidden
from lfm.errors import HyperparameterError


def streams(widths, tokens=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, width, generator=draw, dtype=torch.float64) for width in widths]


def test_the_distance_is_that_of_plain_loops():
    student, teacher = streams([4, 2]), streams([4, 2], seed=1)
    got = Hidden(logits_share=0.25).feature_loss(student, teacher)
    cosine = Hidden(logits_share=0.0, distance="cosine").feature_loss(student, teacher)
    for token in range(3):
        squares, angles = 0.0, 0.0
        for s, t in zip(student, teacher, strict=True):
            a, b = s[token].tolist(), t[token].tolist()
            squares += sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
            angles += 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
        assert got[token].item() == pytest.approx(0.75 * squares)
        assert cosine[token].item() == pytest.approx(angles)


def test_a_student_that_is_its_teacher_has_no_loss():
    method = Hidden()
    (said,) = (s.log_softmax(-1) for s in streams([5]))
    assert method.token_loss(said, said).abs().max() == 0
    flows = streams([4, 4])
    projected = [p(s) for p, s in zip(method.projections([(4, 4), (4, 4)]), flows, strict=True)]
    assert method.feature_loss(projected, flows).abs().max() == 0


def test_the_next_token_has_its_share():
    student, teacher = (streams([6], seed=i)[0].log_softmax(-1) for i in range(2))
    got = Hidden(logits_share=0.3, temperature=2.0).token_loss(student, teacher)
    torch.testing.assert_close(got, 0.3 * ForwardKL(temperature=2.0).token_loss(student, teacher))


@pytest.mark.parametrize(
    ("mapping", "layers", "pairs"),
    [
        ("uniform", (4, 12), ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))),  # the paper's g(m) = 3m
        ("uniform", (2, 5), ((0, 0), (1, 2), (2, 5))),
        ("uniform", (3, 3), ((0, 0), (1, 1), (2, 2), (3, 3))),
        ("last", (2, 5), ((2, 5),)),
        (((1, 4), (2, 4)), (2, 5), ((1, 4), (2, 4))),
    ],
)
def test_depths_are_paired(mapping, layers, pairs):
    assert Hidden(mapping=mapping).taps(*layers) == pairs


@pytest.mark.parametrize("mapping", [((3, 1),), ((1, 6),)])
def test_a_depth_that_is_not_there_is_refused(mapping):
    with pytest.raises(HyperparameterError, match="depths up to 2 of the student and 5 of the teacher"):
        Hidden(mapping=mapping).taps(2, 5)


def test_only_other_widths_are_projected():
    same, wider = Hidden().projections([(4, 4), (4, 6)])
    assert not list(same.parameters())
    assert {n: p.shape for n, p in wider.named_parameters()} == {"weight": (6, 4)}


def test_a_projection_finds_the_map_that_the_teacher_is():
    """Where the teacher is a linear map of the student, the least squares have that map for their solution."""
    torch.manual_seed(0)
    (student,), wanted = streams([4], tokens=40), torch.randn(6, 4, dtype=torch.float64)
    (project,) = Hidden().projections([(4, 6)]).double()
    learn = torch.optim.LBFGS(project.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        learn.zero_grad()
        found = Hidden().feature_loss([project(student)], [student @ wanted.T]).sum()
        found.backward()
        return found

    learn.step(loss)
    assert loss().item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(project.weight, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mapping": "first"}, "uniform, last, or pairs of depths >= 0"),
        ({"mapping": ()}, "uniform, last, or pairs of depths >= 0"),
        ({"mapping": ((0, -1),)}, "uniform, last, or pairs of depths >= 0"),
        ({"distance": "l1"}, "one of mse, cosine"),
        ({"logits_share": 1.5}, "0 <= logits_share <= 1"),
        ({"temperature": 0.0}, "temperature > 0"),
    ],
)
def test_fields_have_ranges(fields, said):
    with pytest.raises(HyperparameterError, match=said):
        Hidden(**fields)
