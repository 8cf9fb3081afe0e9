"""The way between two networks, point by point."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from lfm.alignment.base import at
from lfm.errors import HyperparameterError
from lfm.recalibration import recalibrate
from operators.connectivity import BarrierError, barrier
from operators.data.images import read_images
from operators.gating import GateClosed, Requirement, gate
from operators.models.networks import labels_of, load
from tests.operators import digits, small


def test_a_barrier_is_what_a_loop_over_the_way_finds(tmp_path, workspace):
    ends = [digits.start(tmp_path / f"end{seed}", seed=seed) for seed in (0, 1)]
    test, seen = small.images(tmp_path / "test"), small.images(tmp_path / "seen", 30, seed=4)
    metrics = barrier.body(workspace, ends=ends, data={"test": test}, calibration=seen, points=5, batch_size=7)
    tensors = [load(model.path).state_dict() for model in ends]
    images, others = read_images(test), read_images(seen)
    network, losses = load(ends[0].path), []
    right = torch.tensor([labels_of(ends[0].path).index(label) for label in images.labels])
    for i in range(5):
        network.load_state_dict(at(tensors, i / 4))
        recalibrate(network, lambda: network(torch.from_numpy(others.pixels)))
        with torch.no_grad():
            said = network(torch.from_numpy(images.pixels)).log_softmax(dim=1)
        losses.append(float(-said[torch.arange(len(right)), right].mean()))
    table = pq.read_table(metrics.path / "points.parquet").to_pydict()
    assert table["loss"] == pytest.approx(losses, rel=1e-4)
    assert table["t"] == [0, 0.25, 0.5, 0.75, 1]
    assert set(table["set"]) == {"test"}
    rises = [loss - ((1 - i / 4) * losses[0] + i / 4 * losses[4]) for i, loss in enumerate(losses)]
    found = metrics.about["sets"]["test"]
    assert found["barrier"] == pytest.approx(max(rises), rel=1e-4, abs=1e-6)
    assert found["at"] == table["t"][rises.index(max(rises))]
    assert (found["documents"], found["digest"]) == (24, images.digest)
    assert json.loads((metrics.path / "metrics.json").read_text())["sets"] == metrics.about["sets"]
    assert [told["done"] for told in workspace.told] == [1, 2, 3, 4, 5]


def test_a_gate_asks_for_a_barrier_that_is_low_enough(tmp_path, workspace):
    one, other = (digits.start(tmp_path / f"end{seed}", seed=seed, batchnorm=False) for seed in (0, 1))
    metrics = barrier.body(workspace, ends=(one, other), data={"test": small.images(tmp_path / "test")}, points=3)
    height = metrics.about["sets"]["test"]["barrier"]
    given = {"model": one, "results": {"way": metrics}}
    fine, steep = (
        Requirement(better="way", than=height + more, on="test", measure="barrier") for more in (0.01, -0.01)
    )
    assert gate.body(workspace, **given, require=(fine,)).uri == one.uri
    with pytest.raises(GateClosed, match=r"barrier of way on test is \d.*, where at most .* is required"):
        gate.body(workspace, **given, require=(steep,))
    pair = Requirement(better="way", than="other", on="test", measure="barrier")
    (clause,) = gate.problems(results={"way": None, "other": None}, require=(pair,))
    assert "barrier is compared with 'other', expected a number" in clause


def test_a_way_that_cannot_be_looked_at_fairly_is_refused(tmp_path, workspace):
    normalised = digits.start(tmp_path / "one")
    plain = digits.start(tmp_path / "plain", batchnorm=False)
    images = small.images(tmp_path / "images")
    for ends, calibration, sentence in (
        ((normalised,), None, "1 models under ends, expected 2"),
        ((normalised, normalised), None, "no calibration, expected images"),
        ((plain, plain), images, "calibration is given, expected none"),
        ((normalised, plain), images, r"network={.*} in its lfm.json, expected {.*} as in ends\[0\]. Give two models"),
    ):
        kinds = {} if calibration is None else {"calibration": ()}
        (clause,) = barrier.problems(ends=ends, data={"test": images}, calibration=calibration, kinds=kinds)
        with pytest.raises(BarrierError, match=sentence) as refused:
            barrier.body(workspace, ends=ends, data={"test": images}, calibration=calibration)
        assert str(BarrierError(*refused.value.args)) == clause


def test_what_is_out_of_range_is_refused(tmp_path, workspace):
    plain, texts = digits.start(tmp_path / "plain", batchnorm=False), small.texts(tmp_path / "texts.jsonl")
    clauses = [*barrier.problems(ends=(plain, plain), data={}, kinds={}, points=2)]
    assert any("points=2, expected points >= 3" in clause for clause in clauses)
    assert any("data is empty" in clause for clause in clauses)
    with pytest.raises(HyperparameterError):
        barrier.body(workspace, ends=(plain, plain), data={}, points=2)
    (clause,) = barrier.problems(ends=(plain, plain), data={"test": texts}, kinds={})
    assert "data 'test': " in clause
