"""What every tuning method keeps, by being a file of the family: as the operator uses it, on a tiny model."""

import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lfm
from lfm.tuning.base import Tune
from operators.artifact import Dataset, Model
from operators.learning.loop import Place, train
from operators.models.language_models import adapted, load
from operators.training import Training
from operators.tuning import _job
from tests.operators import small

pytestmark = pytest.mark.slow

TRAINING = Training(max_steps=2, batch_size=4, length=32, learning_rate=3e-2, seed=5)
IDS = torch.arange(5, 13)[None]
METHODS = pytest.mark.parametrize("name", lfm.names("tuning"))


@dataclass
class Tuned:
    """A method's run: the model as it was attached and as it was trained, and what each said."""

    method: Tune
    given: Model
    model: Any
    learnt: frozenset[str]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    said: tuple[Tensor, Tensor]
    folder: Any


def tuned(method, given, data, folder):
    training = replace(TRAINING, packing=not method.needs.cache)
    job = _job(Place(), model=given, data=data, held_out=None, method=method, training=training)
    model = job.objective.model
    learnt = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = said(model)
    work = small.Work(folder)
    weights = train(job, training, Place(), work, work.scratch).weights
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    (folder / "exported").mkdir()
    job.export(weights, folder / "exported")
    return Tuned(method, given, model, learnt, before, after, (first, said(model)), folder / "exported")


@torch.no_grad()
def said(model):
    model.eval()
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a method, once for all tests."""
    home, made = tmp_path_factory.mktemp("tuning"), {}
    given: tuple[Model, Dataset] = small.saved(home / "model"), small.pairs(home / "pairs.jsonl")

    def run_(name, again=False):
        method = lfm.find(name)()
        if again:
            return tuned(pickle.loads(pickle.dumps(method)), *given, tmp_path_factory.mktemp("again"))
        if name not in made:
            made[name] = tuned(method, *given, tmp_path_factory.mktemp("first"))
        return made[name]

    return run_


@METHODS
def test_attaching_leaves_what_the_model_says_where_the_method_promises_it(run, name):
    done = run(name)
    changed = not torch.allclose(done.said[0], said(load(done.given.path, torch.float32)), rtol=1e-4, atol=1e-5)
    assert changed != done.method.starts_unchanged


@METHODS
def test_only_what_learns_moves_and_something_does(run, name):
    done = run(name)
    assert done.learnt
    moved = {n for n, value in done.after.items() if not torch.equal(value, done.before[n])}
    assert moved
    assert moved <= done.learnt
    assert not torch.equal(*done.said)


@METHODS
def test_what_is_exported_says_what_the_trained_model_does(run, name):
    done = run(name)
    if done.method.gives == "adapter":
        loaded = adapted(load(done.given.path, torch.float32), done.folder)
    else:
        loaded = load(done.folder, torch.float32)
    torch.testing.assert_close(said(loaded), done.said[1], rtol=1e-4, atol=1e-5)


@METHODS
def test_it_learns_the_same_again_whatever_is_drawn_elsewhere(run, name):
    first = run(name)
    torch.manual_seed(12345)
    again = run(name, again=True)
    assert again.learnt == first.learnt
    for parameter, value in first.after.items():
        assert torch.equal(value, again.after[parameter])
