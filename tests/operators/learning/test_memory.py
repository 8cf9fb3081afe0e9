"""What each worker holds under each strategy, by hand."""

import pytest

from operators.footprint import CONTEXT
from operators.learning.memory import footprint, micro_batch
from operators.learning.rehearsal import Rehearsal
from operators.resources import Resources
from operators.training import Training

# 100 values learn, of 500 bytes of weights; activations take 1000 bytes, and gradients are there when these have gone.
COUNTED = Rehearsal(
    learnt=100, bytes=500, saved=900, early=1010, late=700, early_besides=1000, late_besides=300, flops=7.0
)


def held(strategy="single", workers=1, counted=COUNTED, teacher=0, gpus=0.0, offload="none", **training):
    asks = Resources(
        workers=workers,
        strategy=strategy,
        gpus_per_worker=gpus,
        accelerator="gpu" if gpus else "cpu",
        offload=offload,
    )
    return footprint(counted, Training(**{"batch_size": 4, "max_steps": 3, **training}), asks, teacher=teacher)


@pytest.mark.parametrize(
    ("strategy", "workers", "kept"),
    [
        ("single", 1, (500, 400, 800, 0)),
        ("ddp", 2, (500, 400, 800, 400)),
        ("zero1", 2, (500, 400, 600, 400)),
        ("zero2", 2, (500, 200, 600, 400)),
        ("zero3", 2, (250, 200, 600, 400 + 500)),
        ("zero2", 4, (500, 100, 300, 400)),
    ],
)
def test_a_strategy_shares_what_it_says(strategy, workers, kept):
    found = held(strategy, workers)
    assert (found.parameters, found.gradients, found.moments, found.buckets) == kept


def test_gradients_take_the_place_that_activations_leave_unless_they_are_there_already():
    assert held().activations == 1010 - 400  # at the peak there are 10 bytes of gradients
    assert held(micro_batch_size=2).activations == 1000


def test_a_teacher_is_whole_everywhere():
    assert [held(s, 2, teacher=50).teacher for s in ("ddp", "zero3")] == [50, 50]


def test_a_checkpoint_is_made_when_nothing_computes():
    found = held(counted=Rehearsal(**{**dict.fromkeys(COUNTED.__slots__, 0), "learnt": 100, "bytes": 400}))
    assert found.checkpoint == 3 * 400  # weights and both moments
    assert found.on_host == 400 + 800 + 1200 > found.computing
    assert held(checkpoint_every=0).checkpoint == 0


def test_offload_moves_what_does_not_compute_to_the_host():
    found = held("zero3", 2, gpus=1, offload="cpu", checkpoint_every=0)
    assert (found.parameters, found.moments, found.offloaded) == (0, 0, 250 + 600)
    assert found.on_host == 850
    assert found.on_device == found.gradients + found.activations + found.buckets + CONTEXT


def test_operations_are_those_of_all_workers_and_steps():
    assert held("ddp", 2, micro_batch_size=1).flops == 7 * 2 * 2 * 3  # two micro-batches on each of two, three steps
    assert held(max_steps=None).flops == 0  # how many steps an epoch has depends on the data


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "rows"),
    [(8, None, 1, (8, 1)), (8, 3, 1, (3, 3)), (8, 4, 4, (2, 1)), (7, None, 2, (4, 1)), (1, None, 4, (1, 1))],
)
def test_the_rows_that_a_worker_holds_at_once(batch, micro, workers, rows):
    assert micro_batch(Training(batch_size=batch, micro_batch_size=micro), workers) == rows
