"""Networks for images through the verbs that train them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lfm.distillation.forward_kl import ForwardKL
from lfm.distillation.hidden import Hidden
from lfm.distillation.jsd import JSD
from lfm.networks import ImageNetwork, Network
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.base import Resources
from operators.data.batches import global_batch
from operators.data.images import read_images
from operators.distillation import distill, problems as distill_problems
from operators.evaluation import evaluate
from operators.models.networks import labels_of, load
from operators.pretraining import Architecture, pretrain
from operators.training import Training
from operators.tuning import tune
from tests.operators import small

TRAINING = Training(max_steps=30, batch_size=12, learning_rate=3e-2, seed=4)
NETWORK = Network(widths=(6, 6))


def pretrained(folder, data, training=TRAINING, network=NETWORK, work=None):
    work = work or small.Work(folder)
    given = {"tokenizer": None, "held_out": None, "architecture": Architecture()}
    return pretrain.body(work, data=data, network=network, training=training, **given), work


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return small.images(folder / "train", 48), small.images(folder / "test", 30, seed=9)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data):
    return pretrained(tmp_path_factory.mktemp("teacher"), data[0])[0]


def accuracy(tmp_path, name, model, dataset):
    return evaluate.body(small.Work(tmp_path / name), model=model, data={"test": dataset}).about["sets"]["test"]


def test_a_network_learns_labels_and_is_measured_image_by_image(tmp_path, data, teacher):
    found = accuracy(tmp_path, "measured", teacher, data[1])
    model, images = load(teacher.path), read_images(data[1])
    told = model(torch.from_numpy(images.pixels)).detach()
    right = torch.tensor([labels_of(teacher.path).index(label) for label in images.labels])
    assert found["accuracy"] == pytest.approx(float((told.argmax(1) == right).float().mean()))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(told, right)), rel=1e-5)
    assert found["accuracy"] > 0.9
    assert labels_of(teacher.path) == ("column", "corner", "row")
    pixels = read_images(data[0]).pixels
    assert float(model.mean) == pytest.approx(pixels.mean(), rel=1e-5)
    assert float(model.deviation) == pytest.approx(pixels.std(), rel=1e-5)


def test_the_first_steps_are_those_of_adamw_on_the_mean_loss(tmp_path, data):
    training = replace(TRAINING, max_steps=3, warmup=0.0, schedule="constant", clip_norm=None)
    # A bias before a normalisation has no gradient but rounding, which AdamW makes large.
    network = Network(widths=(6, 6), batchnorm=False)
    made, _ = pretrained(tmp_path / "work", data[0], training, network)
    images = read_images(data[0])
    labels = sorted(set(images.labels))
    torch.manual_seed(4)
    mean, deviation = [float(images.pixels.mean())], [float(images.pixels.std())]
    model = ImageNetwork(network, images.shape, 3, mean=mean, deviation=deviation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.0)
    for step in range(3):
        where = global_batch(len(images), step, 12, seed=4)
        right = torch.tensor([labels.index(images.labels[i]) for i in where])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.from_numpy(images.pixels[where])), right).backward()
        optimizer.step()
    got = load(made.path).state_dict()
    assert got.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_what_batch_normalisation_has_seen_goes_on_from_a_checkpoint(tmp_path, data):
    whole, _ = pretrained(tmp_path / "whole", data[0])
    training = replace(TRAINING, checkpoint_every=10)
    _, first = pretrained(tmp_path / "first", data[0], training)
    again = small.Work(tmp_path / "again")
    again.checkpoints = first.checkpoints[:1]  # after 10 of 30 steps
    resumed, _ = pretrained(tmp_path, data[0], training, work=again)
    one, other = (load(model.path).state_dict() for model in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_untrained_network_is_one_of_no_steps_and_the_seed_decides(tmp_path, data):
    made = [
        load(pretrained(tmp_path / str(s), data[0], replace(TRAINING, max_steps=0, seed=s))[0].path) for s in (1, 2)
    ]
    assert not torch.equal(made[0].head.weight, made[1].head.weight)
    assert (made[0].layers[0].norm.num_batches_tracked == 0).all()


def test_tuning_goes_on_from_a_network_and_keeps_its_labels(tmp_path, data, teacher):
    training = replace(TRAINING, max_steps=2)
    work = small.Work(tmp_path / "work")
    tuned = tune.body(work, model=teacher, data=data[1], method=Full(), training=training)
    before, after = load(teacher.path), load(tuned.path)
    assert labels_of(tuned.path) == labels_of(teacher.path)
    assert not torch.equal(before.layers[0].weights.weight, after.layers[0].weights.weight)
    assert int(after.layers[0].norm.num_batches_tracked) == int(before.layers[0].norm.num_batches_tracked) + 2


def test_a_student_learns_what_its_teacher_says_of_images(tmp_path, data, teacher):
    student, _ = pretrained(tmp_path / "s", data[0], replace(TRAINING, max_steps=0), Network(kind="mlp", widths=(8,)))
    given = {"teacher": teacher, "student": student, "data": data[0], "held_out": data[1]}
    method = ForwardKL(temperature=2.0)
    training = replace(TRAINING, max_steps=60, validate_every=60)
    work = small.Work(tmp_path / "work")
    made = distill.body(work, **given, method=method, training=training)
    assert accuracy(tmp_path, "measured", made, data[1])["accuracy"] > 0.8
    images = torch.from_numpy(read_images(data[1]).pixels)
    with torch.no_grad():
        says, learnt = load(teacher.path)(images) / 2, load(made.path)(images) / 2
    shares = says.softmax(1)
    divergence = (shares * (shares.log() - learnt.log_softmax(1))).sum(1).mean() * 4  # the temperature's square
    assert work.told[-1]["held_out_loss"] == pytest.approx(float(divergence), rel=1e-4)


@pytest.mark.ray
def test_a_network_without_normalisation_learns_the_same_with_two_workers(tmp_path, data, one_ray):
    training = replace(TRAINING, max_steps=4)
    plain = Network(kind="mlp", widths=(8,), batchnorm=False)
    alone, _ = pretrained(tmp_path / "one", data[0], training, plain)
    work = small.Work(tmp_path / "two", Resources(workers=2, strategy="ddp", cpus_per_worker=1))
    together, _ = pretrained(tmp_path, data[0], training, plain, work)
    one, other = (load(model.path).state_dict() for model in (alone, together))
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_a_network_is_said_before_anything_runs(tmp_path, data, teacher):
    texts = small.texts(tmp_path / "texts.jsonl")
    decoder = small.saved(tmp_path / "decoder")
    narrow, _ = pretrained(tmp_path / "n", small.images(tmp_path / "n5", side=5), replace(TRAINING, max_steps=0))
    given = {"held_out": None, "training": TRAINING, "resources": Resources()}
    sizes = {"tokenizer": None, "network": NETWORK, "architecture": Architecture(layers=2)}
    clauses = [
        *pretrain.problems(data=texts, **sizes, **given),
        *tune.problems(model=teacher, data=data[0], method=LoRA(), **given),
        *tune.problems(model=teacher, data=texts, method=Full(), **given),
    ]
    assert [clause.split(", expected")[0] for clause in clauses] == [
        f"data: {texts.uri} holds 'text' rows",
        "network: given with the size of a decoder",
        "LoRA: 'network' under model",
        f"data: {texts.uri} holds 'text' rows",
    ]
    for teaching, student, method, what in (
        (teacher, decoder, ForwardKL(), f"student: '{decoder.uri}' is a causal language model"),
        (teacher, narrow, ForwardKL(), "student: it takes images of shape (1, 5, 5)"),
        (teacher, teacher, JSD(student_share=0.5), "student_share=0.5 with networks for images"),
        (teacher, teacher, Hidden(), "Hidden: 'network' under student"),
        (None, teacher, ForwardKL(), "teacher: none is given"),
    ):
        others = {"top_k": None, "hard_weight": 0.0, "max_answer": 8}
        said = list(distill_problems(teacher=teaching, student=student, data=data[0], method=method, **others, **given))
        assert any(clause.startswith(what) for clause in said), said
