"""What a micro-batch holds and computes, counted without memory, beside what it holds where there is some."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from lfm import chunks
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.data.batches import Batch, Rows
from operators.learning.rehearsal import foreseen, rehearsed
from operators.models.objectives import NextToken
from operators.sharing.heap import LOST
from operators.training import Training
from operators.tuning import attached, ready
from tests.operators import small

ROWS, LENGTH = 2, 32


class Toy(nn.Module):
    """Two matrices with a ReLU in between; 8 tokens of width 4 become 8 numbers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 1, bias=False)

    def forward(self, batch):
        x = batch.ids.new_zeros(8, 4, dtype=torch.float32)
        return self.down(torch.relu(self.up(x))).sum()


def counted(make, **sizes):
    with torch.device("meta"):
        made = make()
    return rehearsed(made, **{"rows": 2, "length": 4, "targets": 8, "precision": "float32", **sizes})


def test_a_toy_is_counted_as_by_hand():
    found = counted(Toy)
    weights, x, hidden, out, loss = 4 * 30, 4 * 8 * 4, 4 * 8 * 6, 4 * 8, 4
    assert (found.learnt, found.bytes) == (30, weights)
    assert found.saved == x + hidden + loss  # what the matrices took in; what came out of ReLU is one of these
    assert found.early >= x + 2 * hidden  # before ReLU and after it
    assert found.peak >= weights
    forward, backward = 2 * 8 * 30, 2 * 8 * (24 + 6 + 6)  # into both matrices and into the hidden values, not into x
    assert found.flops == forward + backward
    assert out < hidden


def test_gradients_are_told_from_what_else_there_is():
    found = counted(Toy)
    assert found.besides <= found.peak <= found.besides + 4 * found.learnt


def model(method, precision="float32", checkpointing=False, **changes):
    """A tiny model as `method` trains it."""
    import transformers

    made = transformers.AutoModelForCausalLM.from_config(small.config("llama", **changes))
    training = Training(precision=precision, gradient_checkpointing=checkpointing)
    return NextToken(ready(attached(made, method), made, training), packed=True)


class Kept:
    """A tensor as long as the graph holds it."""

    def __init__(self, value):
        self.value = value


def kept(objective):
    """Bytes of what a real forward pass keeps for the backward pass, beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    held = weakref.WeakSet()

    def pack(value):
        one = Kept(value)
        held.add(one)
        return one

    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    positions = torch.arange(LENGTH // 2).repeat(ROWS, 2)  # two documents, so that attention has a mask
    empty = np.zeros((ROWS, 1), np.int32)
    batch = Batch(ids, positions, ids.clone(), np.arange(ROWS), Rows(empty, empty, empty))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.value):
        loss = objective(batch)
    assert loss.requires_grad
    storages = [one.value.untyped_storage() for one in held]
    found = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}
    return sum(found.values())


@pytest.mark.parametrize("method", [Full(), LoRA(rank=2)])
def test_what_is_saved_is_what_a_real_run_saves(method):
    real = kept(model(method).train())
    found = counted(lambda: model(method), rows=ROWS, length=LENGTH, targets=ROWS * LENGTH)
    assert abs(found.saved - real) <= 0.02 * real


@pytest.mark.parametrize(("method", "more"), [(Full(), {}), (LoRA(rank=2), {}), (Full(), {"checkpointing": True})])
def test_a_deep_model_is_foreseen_from_shallow_ones(method, more):
    def make(layers):
        return (model(method, num_hidden_layers=layers, **more),)

    sizes = {"rows": ROWS, "length": LENGTH, "targets": ROWS * LENGTH}
    deep = counted(lambda: make(5)[0], **sizes)
    found = foreseen(make, [5], **sizes, chunk=8, precision="float32")
    for what in ("learnt", "bytes", "flops"):
        assert getattr(found, what) == getattr(deep, what)
    assert found.saved == pytest.approx(deep.saved, rel=0.01)
    assert found.peak == pytest.approx(deep.peak, rel=0.05)
    assert found.besides == pytest.approx(deep.besides, rel=0.05)


def test_operations_are_six_for_each_weight_and_token_and_those_of_attention():
    tokens, width, layers = ROWS * LENGTH, 16, 2
    found = counted(lambda: model(Full()), rows=ROWS, length=LENGTH, targets=tokens)
    matrices = found.learnt - width * (2 * layers + 1)  # all but the norms; the head is the embedding's matrix
    untied = matrices - small.VOCABULARY * width  # looking up an embedding computes nothing
    attention = 3.5 * 2 * 2 * LENGTH * tokens * width * layers  # two products; backward computes them again
    assert found.flops == pytest.approx(6 * untied * tokens + attention, rel=0.01)


def test_checkpointing_keeps_less_and_computes_more():
    plain = counted(lambda: model(Full(), num_hidden_layers=6), rows=ROWS, length=LENGTH, targets=8)
    again = {"checkpointing": True, "num_hidden_layers": 6}
    sparing = counted(lambda: model(Full(), **again), rows=ROWS, length=LENGTH, targets=8)
    assert sparing.saved < 0.4 * plain.saved
    assert sparing.besides < 0.6 * plain.besides
    assert 1.2 * plain.flops < sparing.flops < 1.4 * plain.flops


def test_in_half_precision_what_is_kept_is_about_half():
    whole = counted(lambda: model(LoRA(rank=2)), rows=ROWS, length=LENGTH, targets=8)
    half = counted(lambda: model(LoRA(rank=2)), rows=ROWS, length=LENGTH, targets=8, precision="bfloat16")
    assert half.saved < 0.9 * whole.saved


class Wide(nn.Module):
    """Rows of which each takes a MiB, and then a quarter of one; what comes out of sinus twice is not kept."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1 << 18))

    def forward(self, batch):
        large = self.scale * 2.0
        return large[: 1 << 16].exp().exp().sum()


def test_small_tensors_lie_in_a_heap_that_loses_a_part_of_their_place():
    whole, found = counted(Wide), counted(Wide, heap=True)
    small, large = 1 << 18, 1 << 20
    assert whole.heap == 0
    assert found.heap >= 2 * small + LOST * 4 * small  # both exponentials are kept, and both have a gradient
    assert found.heap <= 5 * small + LOST * 10 * small
    assert whole.saved == found.saved
    assert found.early == 2 * large <= whole.early  # what is scaled, later its gradient and the parameter's
    assert found.peak == found.early + found.heap


def test_without_anything_to_learn_no_place_is_lost():
    assert counted(lambda: Wide().requires_grad_(False), heap=True).heap == 0


def test_as_many_logits_are_held_at_once_as_where_it_will_run(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 8 * small.VOCABULARY)
    sizes = {"rows": ROWS, "length": LENGTH, "targets": ROWS * LENGTH}
    here, there = (counted(lambda: model(Full()), device=device, **sizes) for device in ("cpu", "cuda"))
    logits = 4 * small.VOCABULARY * ROWS * LENGTH  # a GPU holds them all
    assert there.early - here.early > 0.8 * logits
    assert there.flops == here.flops
