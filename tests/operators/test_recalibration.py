"""Batch normalisation measured anew, from folder to folder."""

import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.recalibration import recalibrate as measured_anew
from operators.data.images import read_images
from operators.data.row_files import DatasetError
from operators.models.networks import labels_of, load
from operators.recalibration import NoNormalisation, recalibrate
from tests.operators import digits, small


def test_a_network_is_written_with_what_its_layers_get_from_all_images(tmp_path, workspace):
    model, images = digits.start(tmp_path / "model"), small.images(tmp_path / "images")
    made = recalibrate.body(workspace, model=model, data=images, batch_size=7)
    wanted = load(model.path)
    measured_anew(wanted, lambda: wanted(torch.from_numpy(read_images(images).pixels)))
    before, found = load(model.path).state_dict(), load(made.path).state_dict()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found[name], value)
    moved = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert moved == {f"layers.{i}.norm.running_{kind}" for i in (0, 1) for kind in ("mean", "var")}
    assert labels_of(made.path) == labels_of(model.path)
    assert made.about == {"images": 24, "layers": 2}


def test_what_has_no_batch_normalisation_is_not_recalibrated(tmp_path, workspace):
    images = small.images(tmp_path / "images")
    for model, what in (
        (digits.start(tmp_path / "plain", batchnorm=False), "a network without any"),
        (small.saved(tmp_path / "text"), "a causal language model"),
    ):
        (clause,) = recalibrate.problems(model=model, data=images)
        assert f"is {what}, expected a network with batch normalisation" in clause
        with pytest.raises(NoNormalisation, match=what) as refused:
            recalibrate.body(workspace, model=model, data=images)
        assert str(NoNormalisation(*refused.value.args)) == clause


def test_what_is_out_of_range_or_of_another_size_is_refused(tmp_path, workspace):
    model, images = digits.start(tmp_path / "model"), small.images(tmp_path / "images", side=8)
    with pytest.raises(HyperparameterError, match="recalibrate: batch_size=0"):
        recalibrate.body(workspace, model=model, data=images, batch_size=0)
    with pytest.raises(DatasetError, match=r"of shape \(1, 8, 8\), expected \(1, 6, 6\)"):
        recalibrate.body(workspace, model=model, data=images)
    (clause,) = recalibrate.problems(model=model, data=small.texts(tmp_path / "texts.jsonl"))
    assert "data: " in clause
