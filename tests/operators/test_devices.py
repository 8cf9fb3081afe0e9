"""What computes on a GPU, on a device that is none: all of it is there, and the results are the CPU's."""

import json
from dataclasses import replace

import pytest
import torch

from lfm.distillation.forward_kl import ForwardKL
from lfm.memory.grace import GRACE
from lfm.merging.task_arithmetic import TaskArithmetic
from lfm.merging.ties import TIES
from lfm.retrieval.knn_lm import KNNLM
from lfm.tuning.full import Full
from lfm.tuning.lora import LoRA
from operators.artifact import Dataset, Model
from operators.distillation import FromTeacher
from operators.engines import endpoint
from operators.engines.consulting import engine_of
from operators.engines.native import Sampling
from operators.indexing import index
from operators.learning.learner import Place
from operators.learning.loop import Job, train
from operators.memories import remember
from operators.merges.engine import MERGE, SCAN, Engine, Job as Merging
from operators.models.objectives import NextToken
from operators.serving import probe_ids
from operators.teaching.teachers import Teacher
from operators.training import Training
from operators.tuning import learner
from tests.elsewhere import THERE, OtherDevice, elsewhere
from tests.lfm.variants import every
from tests.operators import small

pytestmark = pytest.mark.slow

TRAINING = Training(max_steps=3, batch_size=4, micro_batch_size=2, length=12, learning_rate=1e-2, validate_every=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for seed in range(3):
        small.model(seed=seed).save_pretrained(home / str(seed))
    return [home / str(seed) for seed in range(3)]


def test_tensors_of_two_devices_do_not_meet():
    with elsewhere():
        there = torch.arange(3.0).to(THERE)
        assert (there + 1).cpu().tolist() == [1, 2, 3]
        assert (there + torch.tensor(1.0)).device == THERE, "a number may come from the CPU, as on a GPU"
        with pytest.raises(OtherDevice, match=r"aten\.add"):
            there + torch.arange(3.0)
        with pytest.raises(OtherDevice, match="numpy"):
            there.numpy()


@pytest.mark.parametrize("kind", ["full", "lora", "distillation"])
def test_training_on_another_device_is_training(kind, folders, tmp_path):
    rows = small.rows(6)

    def learnt(place, work):
        whole = learner(folders[0], LoRA(rank=2) if kind == "lora" else Full(), TRAINING, place)
        objective = NextToken(whole, packed=True)
        if kind == "distillation":
            teacher = Teacher(small.model(seed=1).to(place.device), temperature=2.0, packed=True)
            objective = FromTeacher(whole, teacher, ForwardKL(temperature=2.0), hard_weight=0.3, packed=True)
        job = Job(objective=objective, rows=rows, held_out=rows, export=lambda weights, folder: None)
        return train(job, TRAINING, place, work, work.scratch).weights

    works = [small.Work(tmp_path / name) for name in ("here", "there")]
    here = learnt(Place(), works[0])
    with elsewhere():
        there = learnt(Place(device=THERE), works[1])
    assert all(type(w) is torch.Tensor for w in there.values()), "on the CPU, whoever trained them"
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=0, atol=1e-3)  # a tenth of one step
    for measure in ("loss", "held_out_loss"):
        assert works[1].curve(measure) == pytest.approx(works[0].curve(measure), rel=1e-5)


@pytest.mark.parametrize("method", every("merging"))
def test_a_merge_computes_where_the_base_is(method):
    draw = torch.Generator().manual_seed(0)
    base, experts = torch.randn(6, 4, generator=draw), torch.randn(2, 6, 4, generator=draw)
    known = {"layer": torch.tensor(0), "coefficients": torch.tensor([0.3, 0.4]), "fisher": torch.rand(2, 6, 4)}
    here = merged(method, base, experts, known)
    with elsewhere():
        there = merged(method, base.to(THERE), experts.to(THERE), {n: v.to(THERE) for n, v in known.items()})
        assert there.device == THERE
        torch.testing.assert_close(there.cpu(), here)


def merged(method, base, experts, known):
    for _ in range(method.passes):
        total = method.scan("w", base, experts, known)
        known = {**known, **({} if total is None else method.settle(total, known))}
    return method.merge("w", base, experts, known)


@pytest.mark.parametrize("method", [TIES(), TaskArithmetic()], ids=repr)
def test_a_merge_of_files_computes_on_the_device_that_it_has(method, folders, tmp_path):
    base, *experts = (Model(str(f), "") for f in folders)
    job = Merging(
        base=base, experts=tuple(experts), statistics=(), method=method, dtype="bfloat16", folder=tmp_path / "here",
        shard_bytes=10**9,
    )  # fmt: skip
    written(job)
    with elsewhere():
        written(replace(job, device=str(THERE), folder=tmp_path / "there"))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "there")]
    assert files[0] == files[1]


@pytest.mark.parametrize("kept", ["nothing", "memory", "datastore"])
def test_a_replica_answers_with_the_device_that_ray_has_given_it(kept, tmp_path, monkeypatch, workspace):
    model, data = small.saved(tmp_path / "model", seed=3), tmp_path / "data.jsonl"
    given = {"memory": None, "datastore": None}
    if kept == "memory":
        data.write_text(json.dumps({"subject": "dog", "prompt": "the dog ran", "target": "over"}))
        method = GRACE(radius=1e-3, steps=5)
        given[kept] = remember.body(workspace, model=model, facts=Dataset(str(data)), method=method)
    if kept == "datastore":
        data.write_text(json.dumps({"text": "the dog ran over it"}))
        given[kept] = index.body(workspace, model=model, data=Dataset(str(data)), method=KNNLM(k=2), length=32)
    monkeypatch.setattr(endpoint, "given_device", lambda: THERE)
    here, ids = engine_of(model, **given), probe_ids(model.path)
    with elsewhere():
        replica = endpoint.Replica(model, **given, name="tiny", about={})
        assert {p.device for p in replica.engine.model.parameters()} == {THERE}
        told = replica.probe(ids)
        said = replica.engine.complete([ids[:3]], Sampling(max_tokens=4))
    torch.testing.assert_close(torch.tensor(told), here.logits(ids))
    assert said == here.complete([ids[:3]], Sampling(max_tokens=4))


def written(job):
    """Do all pieces of a merge in this thread."""
    engine, found = Engine(job), {}
    job.folder.mkdir()
    engine.writer.allocate()
    with torch.no_grad():
        for _ in range(job.method.passes):
            parts = [engine.do(SCAN, n, found) for n in range(len(engine.work[SCAN]))]
            found |= job.method.settle(sum(parts), found)
        for number in range(len(engine.work[MERGE])):
            engine.do(MERGE, number, found)
