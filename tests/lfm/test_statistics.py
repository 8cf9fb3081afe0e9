import itertools
from dataclasses import dataclass

import pytest
import torch

from lfm.hooks import NoBlocks
from lfm.statistics import Fisher, Gram, ManyLabels, Observer, Seen, drawn
from tests.operators import small

ROWS = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.3, -0.7], [-0.2, 0.8, 1.1]])


@dataclass
class Told:
    """What a linear model says of some inputs, a label each."""

    model: torch.nn.Linear
    inputs: torch.Tensor
    labels: torch.Tensor

    def logits(self, where):
        return self.model(self.inputs[where])

    def log_likelihood(self, labels):
        return self.model(self.inputs).log_softmax(-1).gather(1, labels[:, None]).sum()


def classifier(classes=2):
    torch.manual_seed(0)
    return torch.nn.Linear(3, classes).double()


def seen(model, inputs, labels, row=0):
    told = Told(model, inputs.double(), torch.tensor(labels))
    return Seen([row], torch.ones(1, len(inputs), dtype=torch.bool), {}, told)


def mean_over_rows(statistic, model, labels=(0, 1, 1)):
    """What a pass over `ROWS` gives."""
    total = {}
    for i, (row, label) in enumerate(zip(ROWS, labels, strict=True)):
        for name, value in statistic.observe(model, seen(model, row[None], [label], row=i)).items():
            total[name] = total.get(name, 0) + value
    return {name: statistic.finish(value, len(ROWS)) for name, value in total.items()}


def test_the_fisher_of_logistic_regression_is_its_closed_form():
    model = classifier()
    found = mean_over_rows(Fisher(labels="exact"), model)
    for j in range(3):
        by_hand = 0.0
        for row in ROWS.double().tolist():
            logits = [sum(w * x for w, x in zip(ws, row, strict=True)) for ws in model.weight.tolist()]
            odds = [logit + b for logit, b in zip(logits, model.bias.tolist(), strict=True)]
            p = 1 / (1 + torch.tensor(odds[0] - odds[1]).exp().item())
            by_hand += p * (1 - p) * row[j] ** 2 / 3
        for c in range(2):
            assert found["fisher/weight"][c, j].item() == pytest.approx(by_hand, rel=1e-5)


def test_the_mean_over_many_draws_is_what_all_classes_give():
    model = classifier(4)
    exact = mean_over_rows(Fisher(labels="exact"), model)
    draws = [mean_over_rows(Fisher(seed=s), model) for s in range(600)]
    for name, value in exact.items():
        stack = torch.stack([d[name] for d in draws])
        spread = stack.std(0) / len(draws) ** 0.5
        assert ((stack.mean(0) - value).abs() <= 4.5 * spread).all()


def test_the_datas_own_labels_give_the_mean_of_squared_gradients_not_the_square_of_their_mean():
    model = classifier()
    found = mean_over_rows(Fisher(labels="data"), model, labels=(0, 1, 1))
    by_hand = torch.zeros(2, 3)
    for row, label in zip(ROWS, (0, 1, 1), strict=True):
        shares = model(row.double()).softmax(-1).tolist()
        for c, j in itertools.product(range(2), range(3)):
            by_hand[c, j] += (((c == label) - shares[c]) * row[j].item()) ** 2 / 3
    torch.testing.assert_close(found["fisher/weight"], by_hand)


def test_one_gradient_for_a_row_of_several_labels_is_on_average_the_sum_of_one_for_each():
    """The claim of the docstring, by going through all labels that the row could have."""
    model = classifier(3)
    shares = model(ROWS.double()).softmax(-1)
    whole = torch.zeros(3, 3)
    for labels in itertools.product(range(3), repeat=3):
        share = torch.stack([shares[t, label] for t, label in enumerate(labels)]).prod().item()
        whole += share * Fisher(labels="data").observe(model, seen(model, ROWS, labels))["fisher/weight"]
    singly = sum(Fisher(labels="exact").observe(model, seen(model, row[None], [0]))["fisher/weight"] for row in ROWS)
    torch.testing.assert_close(whole, singly)


def test_draws_follow_the_model_and_depend_on_seed_and_row_alone():
    told = Told(torch.nn.Linear(1, 3), torch.zeros(20_000, 1), torch.zeros(20_000, dtype=torch.long))
    with torch.no_grad():
        told.model.bias.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    labels = drawn(told, 20_000, (3, 7))
    shares = labels.bincount(minlength=3) / len(labels)
    assert (shares - torch.tensor([0.2, 0.5, 0.3])).abs().max() < 0.015
    torch.manual_seed(99)
    assert torch.equal(labels, drawn(told, 20_000, (3, 7)))
    assert not torch.equal(labels, drawn(told, 20_000, (3, 8)))
    assert torch.equal(labels[:100], drawn(told, 100, (3, 7)))


def test_all_classes_of_many_labels_are_refused():
    with pytest.raises(ManyLabels, match="3 labels in a row, expected one"):
        Fisher(labels="exact").observe(classifier(), seen(classifier(), ROWS, [0, 1, 1]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_gram_is_the_sum_of_outer_products_of_the_tokens_that_count(kind):
    model = small.model(kind).eval()
    observer = Observer(model, [Gram(modules="all")])
    assert not observer.row_by_row
    ids = torch.arange(12).reshape(2, 6) + 5
    read = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    caught = {}

    def look(name):
        return lambda module, arguments: caught.update({name: arguments[0].detach().reshape(12, -1)})

    found = observer([0, 1], read, lambda: model(input_ids=ids))
    handles = [model.get_submodule(n.removeprefix("gram/")).register_forward_pre_hook(look(n)) for n in found]
    model(input_ids=ids)
    assert len(found) == len(handles) == 2 * {"llama": 7, "gpt2": 4, "opt": 6}[kind]
    for name, value in found.items():
        by_hand = torch.zeros_like(value)
        for i, token in enumerate(caught[name]):
            if read.reshape(-1)[i]:
                by_hand += torch.outer(token, token)
        torch.testing.assert_close(value, by_hand, rtol=1e-4, atol=1e-5)


def test_keys_are_what_goes_into_the_last_matrix_of_each_mlp_of_the_chosen_layers():
    model = small.model("gpt2")
    assert Gram().watched(model) == ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")
    assert Gram(layers=(1,)).watched(model) == ("transformer.h.1.mlp.c_proj",)
    with pytest.raises(NoBlocks, match="layer 2, expected one of its layers 0 to 1"):
        Gram(layers=(2,)).watched(model)
    with pytest.raises(NoBlocks):
        Observer(torch.nn.Linear(2, 2), [Gram()])
