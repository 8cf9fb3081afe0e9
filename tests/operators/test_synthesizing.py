import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lfm.distillation.forward_kl import ForwardKL
from lfm.errors import HyperparameterError
from lfm.networks import ImageNetwork, Network
from lfm.synthesis.deep_inversion import DeepInversion
from lfm.synthesis.dfme import DFME
from operators.artifact import Dataset, Model, kind_of
from operators.catalog import Catalog
from operators.data.images import Images, read_images, write_images
from operators.distillation import distill
from operators.evaluation import evaluate
from operators.models.networks import load, save
from operators.pretraining import Architecture, pretrain
from operators.sharing.notices import Preempted
from operators.synthesizing import SynthesisDiverged, problems, synthesize
from operators.training import Training
from tests.operators import small

PIXELS = DeepInversion(num_images=18, batch_size=6, steps=3)
COPY = DFME(batch_size=6, budget=6 * 4 * 3, student_steps=2, latent=4, width=2)
LABELS = ("column", "corner", "row")


def saved(folder, network=None, seed=0, labels=LABELS, shape=(1, 6, 6)):
    torch.manual_seed(seed)
    save(ImageNetwork(network or Network(widths=(4,)), shape, len(labels)), {}, labels, folder)
    return Model(str(folder))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("synthesizing")


@pytest.fixture(scope="module")
def teacher(home):
    return saved(home / "teacher")


@pytest.fixture(scope="module")
def student(home):
    return saved(home / "student", Network(widths=(3,), batchnorm=False), seed=1)


def work_in(home):
    work_in.count += 1
    return small.Work(home / f"work-{work_in.count}")


work_in.count = 0


def test_pixels_become_a_data_set_with_the_labels_that_they_were_made_for(home, teacher):
    work = work_in(home)
    made = synthesize.body(work, teacher=teacher, method=PIXELS)
    assert isinstance(made, Dataset)
    images, state, known = read_images(made), PIXELS.start((1, 6, 6), 3, seed=0), load(teacher.path)
    for number in range(3):
        state, batch = PIXELS.round(state, known, None)
        assert np.array_equal(images.pixels[6 * number : 6 * number + 6], batch.images.numpy())
    assert images.labels == LABELS * 6
    said = [LABELS[i] for i in known(torch.from_numpy(images.pixels[12:])).argmax(dim=1)]
    agreed = sum(map(str.__eq__, said, images.labels[12:])) / 6
    assert made.about == {"method": "DeepInversion", "rounds": 3, "agreement": pytest.approx(agreed)}
    assert [line["done"] for line in work.told] == [1, 2, 3]


def test_a_student_copies_a_teacher_that_is_asked_exactly_so_often(home, teacher, student):
    work = work_in(home)
    made = synthesize.body(work, teacher=teacher, student=student, method=replace(COPY, budget=80))
    assert isinstance(made, Model)
    assert made.about["queries"] == 72  # three rounds; a fourth would cost more than what is left
    assert work.curve("queries") == [24, 48, 72]
    before, after = load(student.path).state_dict(), load(made.path).state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in before if name.startswith("layers"))


@pytest.mark.parametrize("method", [PIXELS, COPY])
def test_after_an_interruption_it_goes_on_as_if_there_had_been_none(home, teacher, student, method):
    given = {"teacher": teacher, "student": student if method is COPY else None, "method": method, "seed": 3}
    whole = synthesize.body(work_in(home), **given)
    work = work_in(home)
    work.goes_at = 1
    with pytest.raises(Preempted):
        synthesize.body(work, **given)
    again = work.another()
    again.checkpoints = work.checkpoints
    made = synthesize.body(again, **given)
    assert [line["done"] for line in again.told] == [2, 3]
    assert made.about == whole.about
    names = sorted(path.name for path in whole.path.iterdir())
    assert names == sorted(path.name for path in made.path.iterdir())
    assert all((whole.path / name).read_bytes() == (made.path / name).read_bytes() for name in names)


def test_competition_looks_at_a_student_and_leaves_it_as_it_is(home, teacher, student):
    method = replace(PIXELS, competition=10.0)
    made = synthesize.body(work_in(home), teacher=teacher, student=student, method=method)
    alone = synthesize.body(work_in(home), teacher=teacher, method=PIXELS)
    assert isinstance(made, Dataset)
    assert not np.array_equal(read_images(made).pixels, read_images(alone).pixels)


def test_what_is_no_number_any_more_is_said_at_once(home, teacher, student):
    with pytest.raises(SynthesisDiverged, match=r"DFME: round 1 made weights that are no numbers, .*\. Lower"):
        synthesize.body(work_in(home), teacher=teacher, student=student, method=replace(COPY, student_rate=1e38))
    error = SynthesisDiverged("DFME", 1, "weights")
    assert str(type(error)(*error.args)) == str(error)


def test_the_plan_says_what_is_wrong(home, tmp_path, workspace, teacher, student):
    given = {"teacher": teacher, "student": None, "method": PIXELS}
    assert list(problems(**given)) == []
    assert list(problems(teacher=None, student=None, method=COPY, kinds={"student": (Model,)})) == []
    plain = saved(home / "plain", Network(widths=(4,), batchnorm=False))
    (clause,) = problems(**{**given, "teacher": plain})
    assert clause.startswith("DeepInversion: 'network' under teacher, expected 'batchnorm'.")
    (clause,) = problems(**{**given, "method": COPY})
    assert clause.startswith("DFME: no student, expected a network")
    assert list(problems(teacher=plain, student=student, method=COPY)) == []
    for method, holds in ((PIXELS, False), (replace(PIXELS, competition=1.0), True)):
        clauses = list(problems(**{**given, "method": method, "student": student}))
        assert clauses == [] if holds else clauses[0].startswith("DeepInversion: a student is given, expected none")
    other = saved(home / "other", labels=("a", "b"), shape=(1, 5, 6))
    clauses = list(problems(teacher=teacher, student=other, method=COPY))
    assert ["tells the labels" in clauses[0], "takes images of shape" in clauses[1]] == [True, True]
    small.saved(tmp_path / "decoder")
    (clause,) = problems(**{**given, "teacher": Model(str(tmp_path / "decoder"))})
    assert "expected a network for images" in clause
    (clause,) = problems(**given, seed=-1)
    assert "seed=-1, expected seed >= 0" in clause
    with pytest.raises(HyperparameterError):
        synthesize.body(workspace, teacher=teacher, method=PIXELS, seed=-1)


def test_the_method_decides_what_the_verb_makes():
    verb = Catalog().operator("synthesize")
    assert verb.gives == (Dataset, Model)
    assert (PIXELS.gives, COPY.gives) == tuple(map(kind_of, verb.gives))
    assert set(verb.edges) == {"teacher", "student"}


@pytest.fixture(scope="module")
def digits(home):
    """Scikit-learn's handwritten digits, a network that knows them, and one that knows nothing."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    for name, some in (("train", order[:1297]), ("test", order[1297:])):
        pixels = (found.images[some, None] / 16).astype(np.float32)
        write_images(Images(pixels, tuple(map(str, found.target[some]))), home / name)
    train, test = Dataset(str(home / "train")), Dataset(str(home / "test"))
    training = Training(max_steps=160, batch_size=64, learning_rate=5e-3)
    made = []
    for steps, seed in ((160, 0), (0, 1)):
        given = {"tokenizer": None, "held_out": None, "architecture": Architecture()}
        given |= {"training": replace(training, max_steps=steps, seed=seed), "network": Network(widths=(16, 32))}
        made.append(pretrain.body(work_in(home), data=train, **given))
    return test, *made


@pytest.mark.slow
def test_what_is_made_without_data_teaches_digits_better_than_noise(home, digits):
    test, teacher, student = digits

    def accuracy(model):
        return evaluate.body(work_in(home), model=model, data={"test": test}).about["sets"]["test"]["accuracy"]

    def taught(data):
        training = Training(max_steps=120, batch_size=32, learning_rate=5e-3)
        given = {"held_out": None, "method": ForwardKL(), "training": training}
        return accuracy(distill.body(work_in(home), teacher=teacher, student=student, data=data, **given))

    before = copy.deepcopy(load(teacher.path).state_dict())
    pixels = DeepInversion(num_images=128, batch_size=128, steps=50)
    noise, made = (
        synthesize.body(work_in(home), teacher=teacher, method=replace(pixels, steps=steps)) for steps in (0, 50)
    )
    assert made.about["agreement"] > 0.9
    copied = DFME(budget=20_000, batch_size=32, latent=64, width=16)
    black_box = synthesize.body(work_in(home), teacher=teacher, student=student, method=copied)
    found = {"noise": taught(noise), "inverted": taught(made), "copied": accuracy(black_box)}
    assert accuracy(teacher) >= 0.95
    assert found["inverted"] > found["noise"] + 0.15, found
    assert found["copied"] > found["noise"] + 0.15, found
    assert black_box.about["queries"] == 20_000 // 224 * 224
    assert all(torch.equal(tensor, before[name]) for name, tensor in load(teacher.path).state_dict().items())
