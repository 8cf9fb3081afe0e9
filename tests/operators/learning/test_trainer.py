"""Where training happens: in the step's process, or in workers of Ray Train."""

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lfm.tuning.lora import LoRA
from operators.base import Resources
from operators.catalog import Catalog
from operators.code import bring
from operators.data.batches import NoLossToken
from operators.learning.trainer import GroupFailed, _as_before, _reason, fit, refused
from operators.pretraining import Architecture, pretrain
from operators.resources import ResourcesError
from operators.sharing.notices import NodeLost
from operators.training import Training
from operators.tuning import tune
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Journal, history, states
from pipelines.plan import PlanError, plan
from pipelines.run import run
from pipelines.source import pack
from pipelines.spec import load
from tests.operators import small

TRAINING = {"max_steps": 4, "batch_size": 5, "micro_batch_size": 2, "length": 16, "learning_rate": 0.02, "seed": 3}
SIZES = {"layers": 1, "width": 16, "heads": 2, "vocabulary": 320, "context": 32}
MINE = '''
"""A user's own operator that trains, and fails at it."""

from operators.artifact import Dataset, Model
from operators.base import operator
from operators.learning.trainer import fit
from operators.training import Training
from operators.workspace import Workspace


def put_together(place, reason):
    raise ValueError(f"{reason} among {place.world}")


@operator()
def stumble(work: Workspace, *, data: Dataset, reason: str, training: Training) -> Model:
    """Fail."""
    folder, _ = fit(work, put_together, {"reason": reason}, training)
    return work.save(Model, folder)
'''
PIPELINE = """
name: together
uses: [mine.py]
inputs:
  text: {dataset: FOLDER/texts.jsonl}
  pairs: {dataset: FOLDER/pairs.jsonl}
  base: {model: FOLDER/base}
steps:
  written:
    operator: pretrain
    inputs: {data: text}
    params: PRETRAIN
    resources: {workers: 2, strategy: ddp}
  adapter:
    operator: tune
    inputs: {model: base, data: pairs}
    method: {name: lora, rank: 2}
    params: TUNE
    resources: {workers: 2, strategy: zero3}
  broken:
    operator: stumble
    inputs: {data: text}
    params: {reason: asked to fail}
    resources: {strategy: zero1}
"""


class Given:
    """A folder with a pipeline whose steps start workers."""

    def __init__(self, folder):
        self.base = small.saved(folder / "base")
        self.text, self.pairs = small.texts(folder / "texts.jsonl"), small.pairs(folder / "pairs.jsonl")
        (folder / "mine.py").write_text(MINE)
        text = PIPELINE.replace("FOLDER", str(folder)).replace("PRETRAIN", json.dumps({**TRAINING, **SIZES}))
        self.pipeline = text.replace("TUNE", json.dumps({**TRAINING, "length": 32, "checkpoint_every": 2}))
        self.folder = folder

    def plan(self, store, *changes):
        code = pack(self.folder, ("mine.py",))
        catalog = Catalog(bring(code, str(self.folder)))
        spec = load(self.pipeline, source="together.yaml", catalog=catalog, code=code, changes=changes)
        return plan(spec, Looks(Path(store.storage.uri) / "inputs.sqlite", store), catalog)


@pytest.fixture
def given(tmp_path):
    (tmp_path / "given").mkdir()
    return Given(tmp_path / "given")


@pytest.mark.ray
@pytest.mark.slow
def test_steps_whose_workers_share_a_model_give_what_one_process_gives(given, store, ray_local, tmp_path):
    """Also: a failure in a user's own module arrives as one sentence, and what workers printed is in the log."""
    journal = Journal.claim(store.storage, "one")
    made = given.plan(store)
    assert run(made, store, journal, connect=ray_local) == "failed"
    steps = states(history(store.storage, "one"), made.steps)
    assert {n: s.state for n, s in steps.items()} == {"written": "done", "adapter": "done", "broken": "failed"}

    work = small.Work(tmp_path / "written")
    whole = pretrain.body(
        work,
        data=given.text,
        tokenizer=None,
        held_out=None,
        architecture=Architecture(**SIZES),
        training=Training(**TRAINING),
    )
    same(store.get(steps["written"].data["digest"]), whole, "model.safetensors")
    assert told(store, "written") == pytest.approx(work.curve(), rel=1e-5)

    work = small.Work(tmp_path / "adapter")
    training = Training(**{**TRAINING, "length": 32})
    adapter = tune.body(work, model=given.base, data=given.pairs, held_out=None, method=LoRA(rank=2), training=training)
    same(store.get(steps["adapter"].data["digest"]), adapter, "adapter_model.safetensors")
    assert told(store, "adapter") == pytest.approx(work.curve(), rel=1e-5)

    assert steps["broken"].data["error"] == "GroupFailed"
    assert steps["broken"].data["sentence"].startswith("worker 0: ValueError: asked to fail among 1, expected")
    log = store.storage.read(steps["broken"].data["log"]).decode()
    assert "put_together" in log, "the worker's traceback is not there"


def same(got, wanted, file):
    one, other = load_file(got.path / file), load_file(wanted.path / file)
    assert one.keys() == other.keys()
    assert max((one[n] - other[n]).abs().max().item() for n in one) < 1e-5
    for key in ("steps", "loss_tokens", "rows"):
        assert got.about[key] == wanted.about[key]


def told(store, step):
    lines = store.storage.read(f"runs/one/measures/{step}/1.jsonl").decode().splitlines()
    return [m["loss"] for m in (json.loads(line).get("measures", {}) for line in lines) if "loss" in m]


def test_how_workers_share_a_model_is_no_part_of_a_fingerprint(given, store):
    fingerprint = given.plan(store).steps["adapter"].fingerprint
    alone = ("adapter.strategy=single", "adapter.workers=1")
    for changes in (("adapter.strategy=ddp",), ("adapter.workers=[1, 4]",), alone, ("adapter.offload=cpu",)):
        assert given.plan(store, *changes).steps["adapter"].fingerprint == fingerprint
    assert given.plan(store, "adapter.seed=4").steps["adapter"].fingerprint != fingerprint


def test_steps_whose_workers_share_a_model_ask_nothing_for_themselves(given, store):
    assert given.plan(store).steps["adapter"].starts_workers
    assert given.plan(store, "adapter.workers=1").steps["adapter"].starts_workers
    assert not given.plan(store, "adapter.workers=1", "adapter.strategy=single").steps["adapter"].starts_workers


def test_several_workers_without_a_strategy_are_refused_at_plan_time(given, store):
    with pytest.raises(PlanError, match=r"step 'adapter': strategy='single' with workers=2, expected ddp, zero1"):
        given.plan(store, "adapter.strategy=single")


def test_a_strategy_for_what_trains_nothing_is_refused_at_plan_time(given, store):
    given.pipeline += (
        "  looked: {operator: evaluate, inputs: {model: base, data: {a: pairs}}, resources: {strategy: ddp}}\n"
    )
    with pytest.raises(PlanError, match=r"step 'looked': strategy='ddp' for 'evaluate', which trains nothing"):
        given.plan(store)


def test_workers_that_may_change_are_refused_where_nothing_is_trained(given, store):
    looked = "{operator: evaluate, inputs: {model: base, data: {a: pairs}}, resources: {workers: [1, 2]}}"
    measured = "{operator: measure, inputs: {model: base, data: pairs}, resources: {workers: [1, 2]}}"
    given.pipeline += f"  looked: {looked}\n  measured: {measured}\n"
    with pytest.raises(PlanError) as found:
        given.plan(store)
    said = "\n".join(found.value.problems)
    assert "step 'looked': workers=1 to 2 for 'evaluate', which starts no workers, expected 1. Leave it out." in said
    assert "step 'measured': workers=1 to 2 for 'measure', which trains nothing, expected one number." in said


def test_what_a_device_lacks_is_refused():
    half, gpu = Training(precision="float16"), {"accelerator": "gpu", "gpus_per_worker": 1}
    assert [c.split(",")[0] for c in refused(half, Resources(workers=2, strategy="zero2"))] == [
        "precision='float16' on a CPU"
    ]
    assert list(refused(half, Resources(**gpu))) == []
    assert list(refused(Training(precision="bfloat16"), Resources(strategy="zero3"))) == []


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_offloading_without_zero_is_refused(strategy):
    with pytest.raises(ResourcesError, match="offload='cpu', expected 'none', or 'cpu' with strategy zero1"):
        Resources(strategy=strategy, offload="cpu")


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ResourcesError, match="strategy='zero4', expected one of single, ddp, zero1, zero2, zero3"):
        Resources(strategy="zero4")


def test_workers_without_ray_are_refused(tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    work = small.Work(tmp_path, Resources(workers=2, strategy="ddp"))
    with pytest.raises(GroupFailed, match="worker group: there is no Ray in this process"):
        fit(work, lambda place: None, {}, Training())


def test_signals_and_environment_are_as_before_after_a_group(monkeypatch):
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "1")
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with _as_before(9):
        assert os.environ["RAY_CHDIR_TO_TRIAL_DIR"] == "0"
        for number in before:
            signal.signal(number, lambda *_: None)
    assert {s: signal.getsignal(s) for s in before} == before
    assert os.environ["RAY_CHDIR_TO_TRIAL_DIR"] == "1"
    assert "RAY_TRAIN_METRICS_ENABLED" not in os.environ


def test_the_failure_that_explains_the_others_is_the_one_that_is_told():
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost, meant = ConnectionError("closed by peer.\nmore"), NoLossToken("data.jsonl", 3)
    assert _reason(WorkerGroupError("all", {0: lost, 1: meant}), unasked) is meant
    told = _reason(WorkerGroupError("all", {1: lost}), tuple)
    assert str(told).startswith("worker 1: ConnectionError: closed by peer, expected it to train to the end.")
    assert "no room" in str(_reason(ControllerError(RuntimeError("no room\nat all")), unasked))
    assert str(GroupFailed(*told.args)) == str(told)
    gone = _reason(WorkerGroupError("all", {1: lost}), lambda: ("n1",))
    assert str(gone).startswith("worker 1: ConnectionError: closed by peer; node n1 is gone, expected it to stay.")
    assert NodeLost(*gone.args).nodes == ("n1",)
    died = WorkerHealthCheckFailedError("no answer", failure=RuntimeError("its actor died"))
    assert isinstance(_reason(WorkerGroupError("all", {1: died}), lambda: ("n1",)), NodeLost)
    assert isinstance(_reason(WorkerGroupError("all", {1: KeyError("x")}), unasked), GroupFailed)


def unasked():
    raise AssertionError("nobody has to look at nodes for that")
