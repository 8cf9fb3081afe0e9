"""Folders of networks for images."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm.networks import ImageNetwork, Network
from operators.base import Resources
from operators.models.language_models import architecture_of
from operators.models.networks import NetworkError, is_network, labels_of, load, network_of, save, unsplittable
from operators.training import Training

LABELS = ("no", "yes")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    made = ImageNetwork(Network(widths=(3,)), (2, 4, 4), 2, mean=(0.1, 0.2), deviation=(2.0, 3.0))
    made(torch.rand(5, 2, 4, 4))  # so that its normalisation has seen something
    save(made, {"head.bias": torch.ones(2)}, LABELS, tmp_path / "network")
    return tmp_path / "network"


def said(folder, **changes):
    path = folder / "lfm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_saved_is_loaded_again_with_what_its_normalisation_has_seen(folder):
    torch.manual_seed(0)
    wanted = ImageNetwork(Network(widths=(3,)), (2, 4, 4), 2, mean=(0.1, 0.2), deviation=(2.0, 3.0))
    wanted(torch.rand(5, 2, 4, 4))
    wanted.head.bias.data.fill_(1)
    got = load(folder)
    assert not got.training
    assert got.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in got.state_dict().items())
    assert (labels_of(folder), network_of(folder), got.shape) == (LABELS, Network(widths=(3,)), (2, 4, 4))
    assert is_network(folder)
    assert architecture_of(folder) == "network"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"network": {"kind": "rnn"}}, r"describes its network wrongly in lfm.json \(kind"),
        ({"network": {"depth": 3}}, r"describes its network wrongly in lfm.json \(depth"),
        ({"labels": []}, "has no 'labels'"),
        ({"shape": [1, 2]}, "has no 'shape'"),
        ({"labels": ["a", "b", "c"]}, r"has 'head.bias' of shape \(2,\), expected \(3,\)"),
        ({"network": {"widths": [3], "batchnorm": False}}, "has a tensor 'layers.0.norm.bias'"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder, changes, what):
    said(folder, **changes)
    with pytest.raises(NetworkError, match=what):
        load(folder)


def test_a_tensor_that_is_missing_is_named(folder):
    path = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != "head.weight"}, path)
    with pytest.raises(NetworkError, match=r"has no tensor 'head\.weight'"):
        load(folder)


def test_batch_normalisation_takes_a_batch_as_a_whole():
    network, training = Network(), Training(batch_size=8)
    assert list(unsplittable(network, training, Resources())) == []
    split = [
        (training, Resources(workers=2, strategy="ddp"), "workers=2 with strategy='ddp'"),
        (training, Resources(strategy="zero1"), "workers=1 with strategy='zero1'"),
        (Training(batch_size=8, micro_batch_size=4), Resources(), "micro_batch_size=4"),
    ]
    for how, resources, beginning in split:
        (clause,) = unsplittable(network, how, resources)
        assert clause.startswith(f"{beginning}, expected")
        assert list(unsplittable(Network(batchnorm=False), how, resources)) == []
