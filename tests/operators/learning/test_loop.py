"""The one loop of every method that follows a gradient."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lfm.errors import HyperparameterError
from operators.data.batches import IGNORED, NoLossToken, global_batch
from operators.learning.loop import Diverged, Job, Place, train
from operators.models.objectives import NextToken
from operators.sharing import pace
from operators.sharing.notices import Preempted
from operators.training import Training
from tests.operators import small

TRAINING = Training(
    max_steps=8, batch_size=4, micro_batch_size=2, length=16, learning_rate=3e-2, warmup=0.2, weight_decay=0.1, seed=5
)


def job(kind="llama", rows=None, held_out=None, **changes):
    model = small.model(kind, **changes)
    return Job(
        objective=NextToken(model, packed=False),
        rows=rows or small.rows(),
        held_out=held_out,
        export=lambda weights, folder: None,
    )


def fitted(folder, training=TRAINING, **changes):
    work = small.Work(folder)
    return train(job(**changes), training, Place(), work, work.scratch), work


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("undisturbed"))


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[n], other[n]) for n in one)


def test_the_first_steps_are_those_of_adamw_written_by_hand(tmp_path):
    training = replace(TRAINING, max_steps=3, clip_norm=0.5, warmup=0.0)
    got, work = fitted(tmp_path, training)
    rows, model = small.rows(), small.model()
    weights = dict(model.named_parameters())
    first, second = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    for step in range(3):
        model.zero_grad()
        loss, tokens = 0.0, 0
        for row in global_batch(10, step, 4, seed=5):
            logits = model(input_ids=torch.tensor(rows.ids[row][None]).long()).logits[0].float()
            for place, target in enumerate(rows.targets[row]):
                if target != IGNORED:
                    loss, tokens = loss - logits[place].log_softmax(-1)[target], tokens + 1
        (loss / tokens).backward()
        norm = math.sqrt(sum(float(w.grad.square().sum()) for w in weights.values()))
        rate = 3e-2 * (1 + math.cos(math.pi * step / 3)) / 2
        told = work.told[step]
        assert (told["loss"], told["gradient_norm"]) == pytest.approx((loss.item() / tokens, norm), rel=1e-5)
        assert told["learning_rate"] == pytest.approx(rate)
        with torch.no_grad():
            for name, w in weights.items():
                gradient = w.grad * min(1.0, 0.5 / (norm + 1e-6))
                if w.ndim > 1:
                    w -= rate * 0.1 * w
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                corrected = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                w -= rate * first[name] / (1 - 0.9 ** (step + 1)) / corrected
    assert norm > 0.5, "nothing was clipped"
    for name, w in weights.items():
        torch.testing.assert_close(got.weights[f"model.{name}"], w.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro", [1, 3, None])
def test_the_size_of_micro_batches_changes_nothing(micro, tmp_path, undisturbed):
    _, work = fitted(tmp_path, replace(TRAINING, micro_batch_size=micro))
    assert work.curve() == pytest.approx(undisturbed[1].curve(), rel=1e-5)
    assert work.curve("gradient_norm") == pytest.approx(undisturbed[1].curve("gradient_norm"), rel=1e-4)


def test_a_model_learns(undisturbed):
    curve = undisturbed[1].curve()
    assert curve[-1] < curve[0] - 0.3


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, undisturbed):
    again, work = fitted(tmp_path / "again")
    assert same(again.weights, undisturbed[0].weights)
    assert work.told == undisturbed[1].told
    other, _ = fitted(tmp_path / "other", replace(TRAINING, seed=6))
    assert not same(other.weights, undisturbed[0].weights)


class Killed(Exception):
    pass


class KilledAfter(small.Work):
    """A workspace whose process dies at a step."""

    last = 0

    def progress(self, done, total, **measures):
        super().progress(done, total, **measures)
        if done == self.last:
            raise Killed


@pytest.mark.parametrize("last", [3, 4, 7])
def test_a_killed_run_goes_on_as_if_nothing_had_been(last, tmp_path):
    # With dropout: what a step draws is part of what goes on. With held-out data: what was looked at too.
    training = replace(TRAINING, checkpoint_every=3, validate_every=2, patience=3)
    dropout = {"kind": "gpt2", "resid_pdrop": 0.2, "held_out": small.rows(seed=1)}
    whole, told = fitted(tmp_path / "whole", replace(training, checkpoint_every=0), **dropout)
    work = KilledAfter(tmp_path / "killed")
    work.last = last
    with pytest.raises(Killed):
        train(job(**dropout), training, Place(), work, work.scratch)
    assert len(work.checkpoints) == (last - 1) // 3
    before = 3 * len(work.checkpoints)
    work.last = 0
    work.told.clear()
    again = train(job(**dropout), training, Place(), work, work.scratch)
    assert work.told == told.told[before:]
    assert same(again.weights, whole.weights)
    assert (again.steps, again.loss_tokens) == (whole.steps, whole.loss_tokens)


@pytest.mark.parametrize("every", [0, 3])
def test_a_notice_ends_it_with_a_checkpoint_and_nothing_is_learnt_twice(every, tmp_path, undisturbed):
    whole, told = undisturbed
    work = small.Work(tmp_path)
    work.goes_at = 3
    training = replace(TRAINING, checkpoint_every=every)
    with pytest.raises(Preempted) as notice:
        train(job(), training, Place(), work, work.scratch)
    assert notice.value.args == (4, 8)
    work.goes_at = float("inf")
    again = train(job(), training, Place(), work, work.scratch)
    assert work.told == told.told
    assert same(again.weights, whole.weights)


def test_unless_told_otherwise_a_checkpoint_is_due_when_it_takes_little_of_the_time(monkeypatch, tmp_path, undisturbed):
    class Slow(small.Work):
        """Each step takes 20 s, and keeping one 3 s."""

        def progress(self, done, total, **measures):
            super().progress(done, total, **measures)
            now[0] += 20

        def keep(self, folder):
            super().keep(folder)
            at.append(len(self.told))
            now[0] += 3

    now, at = [0.0], []
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    work = Slow(tmp_path)
    got = train(job(), replace(TRAINING, max_steps=14), Place(), work, work.scratch)
    assert at == [4, 13], "after a minute, and after fifty times three seconds"
    assert got.steps == 14


def test_a_notice_at_the_last_step_lets_it_end(tmp_path, undisturbed):
    work = small.Work(tmp_path)
    work.goes_at = 7
    assert same(train(job(), TRAINING, Place(), work, work.scratch).weights, undisturbed[0].weights)
    assert work.checkpoints == []


def test_a_checkpoint_holds_parameters_and_moments_by_name(tmp_path):
    _, work = fitted(tmp_path, replace(TRAINING, max_steps=3, checkpoint_every=2))
    (folder,) = work.checkpoints
    names = {f"model.{n}" for n, _ in small.model().named_parameters()}
    assert load_file(folder / "weights.safetensors").keys() == names
    moments = load_file(folder / "moments.safetensors")
    assert moments.keys() == {f"{n}.{kind}" for n in names for kind in ("exp_avg", "exp_avg_sq")}
    state = json.loads((folder / "manifest.json").read_text())
    assert (state["step"], state["optimizer"]["updates"]) == (2, 2)


def test_it_ends_early_with_the_best_weights(tmp_path):
    held_out = small.rows(6, seed=9)
    changes = {"warmup": 0.0, "learning_rate": 0.02, "schedule": "constant", "validate_every": 1, "patience": 2}
    training = replace(TRAINING, max_steps=30, **changes)
    got, work = fitted(tmp_path, training, held_out=held_out)
    looks = work.curve("held_out_loss")
    best = int(np.argmin(looks))
    assert got.steps == len(looks) == best + 3 < 30, "it did not end early"
    until, _ = fitted(tmp_path / "until", replace(training, max_steps=best + 1), held_out=held_out)
    assert same(got.weights, until.weights)


def test_held_out_loss_is_the_mean_over_all_loss_tokens(tmp_path):
    held_out = small.rows(7, seed=9)
    _, work = fitted(tmp_path, replace(TRAINING, max_steps=1, learning_rate=1e-12, validate_every=1), held_out=held_out)
    logits = small.model()(input_ids=torch.tensor(held_out.ids).long()).logits.float()
    targets = torch.tensor(held_out.targets).long()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    assert work.curve("held_out_loss") == pytest.approx([wanted.item()], rel=1e-5)


def test_looking_without_held_out_data_is_refused(tmp_path):
    with pytest.raises(HyperparameterError, match="validate_every=1, expected 0 without held-out data"):
        fitted(tmp_path, replace(TRAINING, validate_every=1))


def test_a_batch_without_an_answer_token_is_an_error(tmp_path):
    rows = small.rows(8)
    rows.targets[global_batch(8, 1, 4, seed=5)] = IGNORED
    with pytest.raises(NoLossToken, match="batch of step 2: none of 4 rows has an answer token"):
        fitted(tmp_path, rows=rows)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(Diverged, match="Lower learning_rate"):
        fitted(tmp_path, replace(TRAINING, learning_rate=1e30, clip_norm=None))


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path, undisturbed):
    got, work = fitted(tmp_path, replace(TRAINING, precision="bfloat16"))
    assert {w.dtype for w in got.weights.values()} == {torch.float32}
    assert work.curve() == pytest.approx(undisturbed[1].curve(), rel=2e-2)
    assert work.curve() != undisturbed[1].curve()


def test_float16_skips_what_overflows_and_goes_on(tmp_path, undisturbed):
    # Planning refuses it on a CPU for its speed alone; the arithmetic is the same there.
    got, work = fitted(tmp_path, replace(TRAINING, precision="float16", checkpoint_every=4))
    state = json.loads((work.checkpoints[0] / "manifest.json").read_text())["optimizer"]
    skipped = sum("gradient_norm" not in line for line in work.told[:4])
    assert state["updates"] == 4 - skipped
    assert state["scale"] == 65536 / 2**skipped
    assert {w.dtype for w in got.weights.values()} == {torch.float32}
    assert work.curve()[-1] < work.curve()[0]


def test_gradient_checkpointing_changes_nothing(tmp_path, undisturbed):
    made = job()
    made.objective.model.gradient_checkpointing_enable({"use_reentrant": False})
    work = small.Work(tmp_path)
    train(made, TRAINING, Place(), work, work.scratch)
    assert work.curve() == pytest.approx(undisturbed[1].curve(), rel=1e-6)


def test_a_part_that_is_frozen_stays_and_carries_no_state(tmp_path):
    made = job()
    made.objective.model.get_input_embeddings().requires_grad_(False)
    before = made.objective.model.get_input_embeddings().weight.clone()
    work = small.Work(tmp_path)
    got = train(made, replace(TRAINING, max_steps=3, checkpoint_every=2), Place(), work, work.scratch)
    assert torch.equal(made.objective.model.get_input_embeddings().weight, before)
    stored = load_file(work.checkpoints[0] / "moments.safetensors")
    assert not any("embed_tokens" in name for name in [*stored, *got.weights])


def test_a_parameter_without_a_gradient_does_not_keep_a_run_from_going_on(tmp_path):
    def unused():
        made = job()
        made.objective.unused = torch.nn.Parameter(torch.ones(2))
        return made

    training = replace(TRAINING, max_steps=4, checkpoint_every=2)
    work = small.Work(tmp_path)
    whole = train(unused(), training, Place(), work, work.scratch)
    curve, work.told = work.curve()[2:], []
    again = train(unused(), training, Place(), work, work.scratch)
    assert work.curve() == curve
    assert same(again.weights, whole.weights)


def test_rows_are_seen_in_the_same_order_whatever_the_batch():
    twos = np.concatenate([global_batch(10, step, 2, seed=1) for step in range(10)])
    fives = np.concatenate([global_batch(10, step, 5, seed=1) for step in range(4)])
    assert twos.tolist() == fives.tolist()
