"""The output ensemble."""

import math

import pytest
import torch

from lfm.ensembling.output import Output
from lfm.errors import HyperparameterError

THREE = (0.5, 0.2, 0.3)


@pytest.fixture
def said():
    draw = torch.Generator().manual_seed(0)
    return (2 * torch.randn(3, 8, 5, generator=draw)).log_softmax(dim=-1)


def by_hand(said, combination, weights):
    """Place by place and class by class."""
    shares = said.exp().double().tolist()
    found = []
    for place in range(said.shape[1]):
        each = [member[place] for member in shares]
        if combination == "mean":
            row = [sum(w * m[c] for w, m in zip(weights, each, strict=True)) for c in range(said.shape[2])]
        elif combination == "geometric":
            row = [math.prod(m[c] ** w for w, m in zip(weights, each, strict=True)) for c in range(said.shape[2])]
            row = [x / sum(row) for x in row]
        else:
            row = max(each, key=max)
        found.append(row)
    return torch.tensor(found)


@pytest.mark.parametrize("weights", [None, THREE])
@pytest.mark.parametrize("combination", ["mean", "geometric", "max"])
def test_it_says_what_a_loop_over_members_places_and_classes_says(said, combination, weights):
    if combination == "max" and weights:
        pytest.skip("nothing is weighed")
    found = Output(combination=combination, weights=weights).combine(said)
    torch.testing.assert_close(found.exp(), by_hand(said, combination, weights or (1 / 3,) * 3).float())


@pytest.mark.parametrize("weights", [None, THREE])
def test_the_loss_of_a_mean_is_never_above_the_mean_of_the_losses(said, weights):
    targets = torch.arange(8) % 5
    each = -said[:, range(8), targets]
    together = -Output(weights=weights).combine(said)[range(8), targets]
    mean = torch.tensordot(torch.tensor(weights or (1 / 3,) * 3), each, dims=1)
    assert (together <= mean + 1e-6).all()
    assert together.mean() < mean.mean()


def test_a_mean_of_logits_is_the_geometric_one():
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 5)
    said = logits.log_softmax(dim=-1)
    torch.testing.assert_close(Output(combination="geometric").combine(said), logits.mean(0).log_softmax(dim=-1))


@pytest.mark.parametrize("combination", ["mean", "geometric", "max"])
def test_one_member_is_that_member_and_a_weight_of_0_leaves_one_out(said, combination):
    torch.testing.assert_close(Output(combination=combination).combine(said[:1]), said[0])
    if combination != "max":
        weighed = Output(combination=combination, weights=(0.0, 1.0, 0.0)).combine(said)
        torch.testing.assert_close(weighed, said[1])


def test_members_as_sure_as_each_other_are_heard_in_their_order():
    said = torch.tensor([[[0.8, 0.1, 0.1]], [[0.1, 0.8, 0.1]]]).log()
    assert torch.equal(Output(combination="max").combine(said), said[0])
    assert torch.equal(Output(combination="max").combine(said.flip(0)), said[1])


def test_nothing_is_lost_of_what_is_very_unlikely():
    said = torch.tensor([[[0.0, -200.0]], [[0.0, -300.0]]])
    torch.testing.assert_close(Output().combine(said)[0, 1], torch.tensor(-200.0 - math.log(2)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"combination": "vote"}, "Output: combination='vote', expected one of mean, geometric, max"),
        ({"weights": (0.5, 0.4)}, "expected none, or numbers of at least 0 that sum to 1"),
        ({"weights": (1.5, -0.5)}, "expected none, or numbers of at least 0 that sum to 1"),
        ({"weights": ()}, "expected none, or numbers of at least 0 that sum to 1"),
        ({"weights": (0.5, 0.5), "combination": "max"}, "expected none where combination is max"),
    ],
)
def test_fields_out_of_range_are_refused(fields, said):
    with pytest.raises(HyperparameterError, match=said):
        Output(**fields)


def test_as_many_weights_as_models_are_asked_for(said):
    with pytest.raises(HyperparameterError, match="expected one number for each of the 3 models"):
        Output(weights=(0.5, 0.5)).combine(said)
