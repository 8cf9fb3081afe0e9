"""Every strategy gives what one process gives: the same loss, the same weights, the same checkpoints."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from operators.learning.loop import Place
from tests.operators import small, together

ROOT = Path(__file__).resolve().parents[3]
WHOLE = ("ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
FEATURES = ("ddp-features", "zero2-features")
OTHERS = (
    *FEATURES,
    "ddp-teacher",
    "zero2-teacher",
    "zero3-teacher",
    "zero2-bfloat16",
    "zero3-bfloat16",
    "zero2-float16",
)
LABELS = ("ddp-labels", "zero2-labels", "zero3-labels")
RESUMED = ("zero1-resumes", "zero3-resumes")
INSERTED = tuple(f"{strategy}-{what}" for what in ("bottleneck", "prefix") for strategy in ("ddp", "zero2", "zero3"))
EPISODES = ("ddp-episodes", "ddp-episodes-texts")
STARTS = ("ddp-starts", "zero2-starts", "zero3-starts")
CASES = (*WHOLE, *OTHERS, *LABELS, *RESUMED, *STARTS, *INSERTED, "zero3-adapter", "zero3-frozen", *EPISODES)

pytestmark = pytest.mark.slow


def single(folder, training=together.TRAINING, **what):
    return together.trained(Place(), folder, training, **what)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return single(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """An undisturbed run of six steps, with a checkpoint after three."""
    return single(tmp_path_factory.mktemp("steady"), together.STEADY)


def group(folder, checkpoint, world, cases):
    """Have some processes go through cases together, each with a checkpoint at hand."""
    small.saved(folder / "model", hidden_size=32, num_key_value_heads=2)
    small.pairs(folder / "pairs.jsonl", 24)
    small.classifier(folder / "classifier", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    small.labelled(folder / "labelled.jsonl", 13)
    small.network(folder / "network")
    small.images(folder / "images")
    (folder / "checkpoint").symlink_to(checkpoint)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.operators.together"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port), str(folder), *cases],
            cwd=ROOT,
            env={**os.environ, "LOCAL_RANK": str(rank)},  # DeepSpeed wants it, as Ray Train sets it
        )
        for rank in range(world)
    ]
    try:
        assert [p.wait(timeout=300) for p in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory, steady):
    """What two processes found that went through all cases."""
    return group(tmp_path_factory.mktemp("together"), steady[1].checkpoints[0], 2, CASES)


@pytest.fixture(scope="module")
def three(tmp_path_factory, home):
    """What three processes found that went on with what two began."""
    (checkpoint,) = (home / "zero3-starts" / "rank-0").glob("kept-*")
    return group(tmp_path_factory.mktemp("three"), checkpoint, 3, RESUMED)


def found(home, case, rank=0):
    return json.loads((home / case / f"found-{rank}.json").read_text())


@pytest.mark.parametrize("case", WHOLE)
def test_every_strategy_has_the_curve_of_one_process(case, home, alone):
    got, wanted = found(home, case), together.curves(alone[1])
    assert len(wanted["loss"]) == 6
    assert len(wanted["held_out_loss"]) == 2
    for key, values in wanted.items():
        assert got[key] == pytest.approx(values, rel=2e-5), key


@pytest.mark.parametrize("case", WHOLE)
def test_every_strategy_gives_the_weights_of_one_process(case, home, alone):
    got = load_file(home / case / "weights.safetensors")
    assert got.keys() == alone[0].weights.keys()
    for name, wanted in alone[0].weights.items():
        torch.testing.assert_close(got[name], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_frozen_teacher_works_under_every_strategy_and_has_no_state(strategy, home, tmp_path):
    got, (trained, work) = found(home, f"{strategy}-teacher"), single(tmp_path, teacher=True)
    assert got["loss"] == pytest.approx(work.curve(), rel=2e-5)
    weights = load_file(home / f"{strategy}-teacher" / "weights.safetensors")
    assert weights.keys() == trained.weights.keys() == {f"model.{n}" for n, _ in small.model().named_parameters()}


@pytest.mark.parametrize("case", FEATURES)
def test_projections_learn_under_every_strategy_that_may(case, home, tmp_path):
    got, (trained, work) = found(home, case), single(tmp_path, features=True)
    assert got["loss"] == pytest.approx(work.curve(), rel=2e-5)
    weights = load_file(home / case / "weights.safetensors")
    assert weights.keys() == trained.weights.keys()
    torch.testing.assert_close(
        weights["features.projections.1.weight"], trained.weights["features.projections.1.weight"]
    )


@pytest.mark.parametrize("case", EPISODES)
def test_what_goes_through_second_derivatives_is_the_same_with_two_workers(case, home, tmp_path):
    weights, work = together.episodes(Place(), tmp_path, home, texts="texts" in case)
    got = found(home, case)
    assert len(work.curve()) == 4
    assert got["loss"] == pytest.approx(work.curve(), rel=2e-5)
    norms = work.curve("gradient_norm")
    assert got["gradient_norm"][0] == pytest.approx(norms[0], rel=2e-5)
    assert got["gradient_norm"] == pytest.approx(norms, rel=5e-3)  # curvature makes large what AdamW makes of rounding
    held = load_file(home / case / "weights.safetensors")
    assert held.keys() == weights.keys()
    for name, wanted in weights.items():
        torch.testing.assert_close(held[name], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["zero2-bfloat16", "zero3-bfloat16", "zero2-float16"])
def test_half_the_precision_is_as_near_as_that_is(case, home, tmp_path):
    _, work = single(tmp_path, replace(together.TRAINING, precision=case.partition("-")[2]))
    assert found(home, case)["loss"] == pytest.approx(work.curve(), rel=5e-3)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_what_two_workers_began_one_goes_on_with(strategy, home, steady, tmp_path):
    (checkpoint,) = (home / f"{strategy}-starts" / "rank-0").glob("kept-*")
    _, work = single(tmp_path, together.STEADY, goes_on=checkpoint)
    assert work.curve() == pytest.approx(steady[1].curve()[3:], rel=2e-5)
    assert work.curve("gradient_norm") == pytest.approx(steady[1].curve("gradient_norm")[3:], rel=2e-4)


@pytest.mark.parametrize("case", RESUMED)
def test_what_one_worker_began_two_go_on_with(case, home, steady):
    got = found(home, case)
    assert got["loss"] == pytest.approx(steady[1].curve()[3:], rel=2e-5)
    assert got["gradient_norm"] == pytest.approx(steady[1].curve("gradient_norm")[3:], rel=2e-4)


@pytest.mark.parametrize("case", RESUMED)
def test_what_two_workers_began_three_go_on_with(case, three, steady):
    got = found(three, case)
    assert got["loss"] == pytest.approx(steady[1].curve()[3:], rel=2e-5)
    assert got["gradient_norm"] == pytest.approx(steady[1].curve("gradient_norm")[3:], rel=2e-4)


def test_an_adapter_under_zero3_is_that_of_one_process(home, tmp_path):
    wanted = together.adapter(Place(), tmp_path, home)
    got = [found(home, "zero3-adapter", rank) for rank in (0, 1)]
    assert got[0]["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert len(wanted["loss"]) == 20
    one, other = (load_file(f / "exported" / "adapter_model.safetensors") for f in (tmp_path, home / "zero3-adapter"))
    assert one.keys() == other.keys()
    assert max((one[n] - other[n]).abs().max().item() for n in one) < 1e-5
    assert max(one[n].abs().max().item() for n in one if "lora_B" in n) > 1e-2, "it learnt nothing"


@pytest.mark.parametrize("case", LABELS)
def test_a_classifier_learns_under_every_strategy_as_in_one_process(case, home, tmp_path):
    wanted, got = together.probed(Place(), tmp_path, home), found(home, case)
    assert len(wanted["held_out_loss"]) == 2
    for key, values in wanted.items():
        assert got[key] == pytest.approx(values, rel=2e-4), key


@pytest.mark.parametrize("case", INSERTED)
def test_what_is_put_into_a_base_learns_as_in_one_process(case, home, tmp_path):
    wanted = together.inserted(Place(), tmp_path, home, together.INSERTED[case.split("-")[1]])
    got = found(home, case)
    assert len(wanted["loss"]) == 4
    for key, values in wanted.items():
        assert got[key] == pytest.approx(values, rel=2e-5), key
    one, other = (load_file(f / "exported" / "adapter_model.safetensors") for f in (tmp_path, home / case))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_what_is_frozen_is_put_together_again_for_an_export_that_needs_it(home):
    unchanged = found(home, "zero3-frozen")
    assert unchanged.keys() == {f"model.{n}" for n, _ in small.model().named_parameters()}
    assert [n for n, same in unchanged.items() if not same] == ["model.lm_head.weight"]
    assert found(home, "zero3-frozen", rank=1) == {}


def test_no_worker_ever_holds_a_base_whole_under_zero3(home):
    largest = max(p.numel() for p in small.model(hidden_size=32, num_key_value_heads=2).parameters())
    total = sum(p.numel() for p in small.model(hidden_size=32, num_key_value_heads=2).parameters())
    for rank in (0, 1):
        shares = found(home, "zero3-adapter", rank)
        assert shares["start"] == pytest.approx(0.5, abs=0.01)
        assert shares["end"] == pytest.approx(0.5, abs=0.01)
        assert 0.5 < shares["most"] <= 0.5 + 2 * largest / total < 1.5
