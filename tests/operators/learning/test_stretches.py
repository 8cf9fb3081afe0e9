"""Trainings whose settings change midway: alone, broken off, and from another one's checkpoint."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm.distillation.jsd import JSD
from lfm.errors import HyperparameterError
from lfm.tuning.lora import LoRA
from operators.base import Resources
from operators.learning.group import _Teller, learn, listening
from operators.learning.loop import Job, NotKept, Place, Rested, train
from operators.learning.stretches import stretches
from operators.learning.trainer import refused
from operators.models.objectives import NextToken
from operators.training import Change, Training
from tests.operators import small

PLAIN = Training(max_steps=6, batch_size=4, length=16, learning_rate=3e-2, warmup=0.2, weight_decay=0.1, seed=5)
CHANGES = (
    Change(at=2, values={"learning_rate": 0.05, "dropout": 0.4}),
    Change(at=3, values={}),
    Change(at=4, values={"weight_decay": 0.5}),
)
CHANGED = replace(PLAIN, midway=CHANGES)


def make(place, *, training, method):
    """A job whose model drops out what the method says."""

    class Dropped(NextToken):
        def forward(self, batch):
            loss = super().forward(batch)
            return loss * (1 - torch.nn.functional.dropout(torch.ones(()), method.dropout or 0.0) * 0.5)

    def export(weights, folder):
        save_file(dict(weights), folder / "weights.safetensors")

    return Job(objective=Dropped(small.model(), packed=False), rows=small.rows(), held_out=None, export=export)


def learnt(folder, training, work=None):
    work = work or small.Work(folder)
    home = work.scratch / f"home-{len(list(work.scratch.iterdir()))}"
    home.mkdir()
    learn(Place(), make, {"training": training, "method": LoRA()}, training, work, home)
    return load_file(home / "trained" / "weights.safetensors"), work


def test_the_parts_of_a_training_have_what_changed_until_then():
    arguments = {"training": PLAIN, "method": LoRA(), "data": "d"}
    parts = stretches(CHANGED, arguments)
    assert [p.first for p in parts] == [0, 2, 3, 4]
    assert [p.training.rest_at for p in parts] == [2, 3, 4, None]
    assert [p.training.learning_rate for p in parts] == [3e-2, 0.05, 0.05, 0.05]
    assert [p.training.weight_decay for p in parts] == [0.1, 0.1, 0.1, 0.5]
    assert [p.arguments["method"].dropout for p in parts] == [0.0, 0.4, 0.4, 0.4]
    assert [p.arguments["training"].weight_decay for p in parts] == [0.1, 0.1, 0.1, 0.5]
    assert all(p.training.midway == () and p.arguments["data"] == "d" for p in parts)
    assert [p.first for p in stretches(replace(CHANGED, rest_at=3), arguments)] == [0, 2]
    assert stretches(replace(CHANGED, rest_at=3), arguments)[-1].training.rest_at == 3
    (whole,) = stretches(PLAIN, arguments)
    assert (whole.training, whole.arguments) == (PLAIN, arguments)


def test_a_change_has_its_effect_from_its_step_on(tmp_path):
    _, before = learnt(tmp_path / "plain", PLAIN)
    _, after = learnt(tmp_path / "changed", replace(PLAIN, midway=(Change(at=3, values={"learning_rate": 0.3}),)))
    rates = [b / a for a, b in zip(before.curve("learning_rate"), after.curve("learning_rate"), strict=True)]
    assert rates == pytest.approx([1, 1, 1, 10, 10, 10])
    assert before.curve()[:4] == after.curve()[:4]  # the fourth loss is what the first three steps made
    assert before.curve()[4] != after.curve()[4]


def test_a_change_of_nothing_changes_nothing(tmp_path):
    plain, _ = learnt(tmp_path / "plain", PLAIN)
    same, _ = learnt(tmp_path / "same", replace(PLAIN, midway=(Change(at=2, values={}), Change(at=5, values={}))))
    assert plain.keys() == same.keys()
    assert all(torch.equal(plain[n], same[n]) for n in plain)


def test_what_rests_goes_on_with_other_settings_to_the_same_weights_as_in_one_go(tmp_path):
    whole, _ = learnt(tmp_path / "whole", CHANGED)
    work = small.Work(tmp_path / "parts")
    for number, change in enumerate(CHANGES):
        with pytest.raises(Rested, match=f"it rests after {change.at} of 6 steps"):
            learnt(tmp_path, replace(PLAIN, midway=CHANGES[:number], rest_at=change.at), work)
        assert work.told[-1]["done"] == change.at
    with pytest.raises(Rested):  # asked for again, it only says again what it measured there
        learnt(tmp_path, replace(PLAIN, midway=CHANGES[:2], rest_at=4), work)
    assert work.told.pop() == work.told[-1]
    parts, _ = learnt(tmp_path, CHANGED, work)
    assert [line["done"] for line in work.told] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


class Refusing(small.Work):
    """A workspace that can keep nothing."""

    def keep(self, folder):
        raise OSError("full")


def in_a_worker(work, home):
    """The changed training with a workspace that hears of it late, as from a group's worker."""
    home.mkdir()
    with listening(work, home):
        learn(Place(), make, {"training": CHANGED, "method": LoRA()}, CHANGED, _Teller(home, Place()), home)
    return load_file(home / "trained" / "weights.safetensors")


def test_a_worker_goes_on_with_other_settings_when_its_step_has_the_checkpoint(tmp_path):
    whole, _ = learnt(tmp_path / "whole", CHANGED)
    work = small.Work(tmp_path / "group")
    parts = in_a_worker(work, tmp_path / "home")
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
    assert [line["done"] for line in work.told] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(NotKept):
        in_a_worker(Refusing(tmp_path / "other"), tmp_path / "other_home")


def test_a_training_that_ends_before_it_should_rest_is_done(tmp_path):
    plain, _ = learnt(tmp_path / "plain", PLAIN)
    same, _ = learnt(tmp_path / "same", replace(PLAIN, rest_at=6))
    assert all(torch.equal(plain[n], same[n]) for n in plain)


def test_a_part_does_not_begin_at_a_checkpoint_from_before_it(tmp_path):
    work = small.Work(tmp_path)
    with pytest.raises(NotKept, match=r"one of step 0, expected one of step 2"):
        train(make(Place(), training=PLAIN, method=LoRA()), PLAIN, Place(), work, work.scratch, least=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"learning_rate": 0.1, "dropout": 0.5}], []),
        ([{"rank": 4}], ["midway: 'rank' after 1 steps, expected one of beta1, beta2, clip_norm, dropout, epsilon,"]),
        ([{"max_steps": 4}], ["midway: 'max_steps' after 1 steps"]),
        ([{"learning_rate": -1}], ["midway: after 1 steps training: learning_rate=-1.0, expected learning_rate > 0."]),
        ([{"learning_rate": "much"}], ["midway: after 1 steps learning_rate='much', expected a valid number"]),
        ([{"dropout": 0.1}, {"dropout": 2.0}], ["midway: after 2 steps LoRA: dropout=2.0, expected 0 <= dropout < 1."]),
    ],
)
def test_what_cannot_change_midway_is_refused(changes, said):
    midway = tuple(Change(at=number, values=values) for number, values in enumerate(changes, 1))
    found = list(refused(replace(PLAIN, midway=midway), Resources(), LoRA()))
    assert len(found) == len(said)
    assert all(sentence.startswith(part) for part, sentence in zip(said, found, strict=True))


def test_changes_are_in_order_and_fields_of_another_method_are_none():
    with pytest.raises(HyperparameterError, match="each change after the one before it"):
        Training(midway=(Change(at=2, values={}), Change(at=2, values={})))
    with pytest.raises(HyperparameterError, match="at >= 1"):
        Change(at=0, values={})
    changed = replace(PLAIN, midway=(Change(at=1, values={"dropout": 0.5}),))
    assert len(list(refused(changed, Resources(), JSD()))) == len(list(refused(changed, Resources()))) == 1
