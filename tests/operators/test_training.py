"""The settings of training."""

import math

import pytest

from lfm.errors import HyperparameterError
from operators.training import Training


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", -1),
        ("epochs", 0.0),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("micro_batch_size", 33),
        ("length", 1),
        ("learning_rate", 0.0),
        ("warmup", 1.0),
        ("final_rate", 1.1),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", 0.0),
        ("clip_norm", 0.0),
        ("checkpoint_every", -1),
        ("validate_every", -1),
        ("patience", 0),
    ],
)
def test_what_is_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(HyperparameterError, match=f"{field}={value!r}, expected"):
        Training(**{field: value})


def test_patience_without_looking_is_refused():
    with pytest.raises(HyperparameterError, match="patience=2, expected none, or validate_every > 0"):
        Training(patience=2)


def test_an_epoch_ends_with_a_whole_batch():
    assert Training(batch_size=4).steps(8) == 2
    assert Training(batch_size=4).steps(9) == 3
    assert Training(batch_size=4, epochs=2.5).steps(8) == 5
    assert Training(batch_size=4, epochs=0.1).steps(8) == 1
    assert Training(batch_size=4, max_steps=0).steps(8) == 0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_and_then_falls_as_its_schedule_says(schedule):
    training = Training(learning_rate=2.0, warmup=0.3, final_rate=0.1, schedule=schedule)
    rates = [training.rate(step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.5])
    for step in range(3, 10):
        done = (step - 3) / 7
        left = {"cosine": 0.5 + 0.5 * math.cos(done * math.pi), "linear": 1 - done, "constant": 1}[schedule]
        assert rates[step] == pytest.approx(2.0 * (0.1 + 0.9 * left))


def test_settings_that_change_no_result_are_no_part_of_a_fingerprint():
    assert Training.noise == {"micro_batch_size", "gradient_checkpointing", "checkpoint_every", "rest_at"}
