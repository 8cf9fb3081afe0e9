"""Adapters that this project puts into a model itself: what `tune` writes, and everything that reads it."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typing_extensions import override

from lfm.merging.linear import Linear
from lfm.tuning.bottleneck_adapter import Bottleneck, BottleneckAdapter
from operators.artifact import Adapter
from operators.base import Resources
from operators.evaluation import evaluate
from operators.learning.loop import Place
from operators.merging import problems as unmergeable
from operators.models.changed_models import BaseNeeded
from operators.models.language_models import adapted, load
from operators.models.rewrites import RewriteError, read
from operators.training import Training
from operators.tuning import learner, tune
from pipelines.inputs.inspector import Looks
from pipelines.plan import InputProblem
from tests.operators import small

pytestmark = pytest.mark.slow

TRAINING = Training(max_steps=6, batch_size=4, micro_batch_size=2, length=32, learning_rate=1e-2, seed=1)
METHOD = BottleneckAdapter(width=4, init=1e-2)
IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    home = tmp_path_factory.mktemp("given")
    return {"model": small.saved(home / "model"), "data": small.pairs(home / "pairs.jsonl"), "held_out": None}


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    """What `tune` gives, and how it went."""
    work = small.Work(tmp_path_factory.mktemp("made"))
    return tune.body(work, method=METHOD, training=TRAINING, **given), work


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_it_learns_and_what_is_loaded_is_what_was_trained(given, made, tmp_path):
    adapter, work = made
    assert type(adapter) is Adapter
    assert adapter.about["base"] == given["model"].digest
    assert work.curve()[-1] < work.curve()[0]
    assert {p.name for p in adapter.path.iterdir()} == {"adapter_model.safetensors", "lfm.json"}
    base = load(given["model"].path)
    model = adapted(load(given["model"].path), adapter.path)
    assert not torch.allclose(logits(model), logits(base), atol=1e-3)
    tensors = load_file(adapter.path / "adapter_model.safetensors")
    before, after = dict(base.named_parameters()), dict(model.named_parameters())
    assert {n for n in after if n not in before or not torch.equal(after[n], before[n])} == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(after[name], tensor)
    assert not any(m.training for m in model.modules())


def test_the_file_says_the_method_its_fields_and_its_base_and_is_the_same_each_time(given, made, tmp_path):
    fields = {"width": 4, "init": 0.01, "norms": True, "convention": "houlsby"}
    said = json.loads((made[0].path / "lfm.json").read_text())
    assert said == {"rewrites": [{"method": "tuning/bottleneck_adapter", "fields": fields}], "base": "d" * 64}
    assert read(made[0].path).methods == (METHOD,)
    again = tune.body(small.Work(tmp_path / "work"), method=METHOD, training=TRAINING, **given)
    for name in ("lfm.json", "adapter_model.safetensors"):
        assert (again.path / name).read_bytes() == (made[0].path / name).read_bytes()


def test_gradient_checkpointing_changes_nothing(given, made, tmp_path):
    work = small.Work(tmp_path / "work")
    tune.body(work, method=METHOD, training=replace(TRAINING, gradient_checkpointing=True), **given)
    assert work.curve() == pytest.approx(made[1].curve(), rel=1e-5)


def test_a_frozen_base_has_the_precision_and_what_learns_is_float32(given, tmp_path):
    half = replace(TRAINING, precision="bfloat16")
    dtypes = {(p.requires_grad, p.dtype) for p in learner(given["model"].path, METHOD, half, Place()).parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    work = small.Work(tmp_path / "work")
    tune.body(work, method=METHOD, training=half, **given)
    assert work.curve()[-1] < work.curve()[0]


def test_it_is_measured_on_its_base_and_on_no_other(given, made, tmp_path):
    found = evaluate.body(
        small.Work(tmp_path / "adapted"), model=made[0], base=given["model"], data={"pairs": given["data"]}, length=32,
        generate=4,
    )  # fmt: skip
    plain = evaluate.body(
        small.Work(tmp_path / "plain"), model=given["model"], data={"pairs": given["data"]}, length=32
    )
    assert found.about["sets"]["pairs"]["loss"] < plain.about["sets"]["pairs"]["loss"]
    whole = adapted(load(given["model"].path), made[0].path)
    added = sum(p.numel() for m in whole.modules() if isinstance(m, Bottleneck) for p in m.parameters())
    assert found.about["parameters"] - plain.about["parameters"] == added == 4 * (2 * 4 * 16 + 4 + 16)
    from_outside = Adapter(made[0].uri)
    other = replace(given["model"], digest="e" * 64)
    for adapter in (made[0], from_outside):
        with pytest.raises(BaseNeeded, match=r"base is eeeeeeeeeeee, expected the adapter's, dddddddddddd"):
            evaluate.body(small.Work(tmp_path / f"no-{len(adapter.about)}"), model=adapter, base=other, data={})


def test_it_is_no_expert_of_a_merge(given, made):
    (clause,) = unmergeable(base=given["model"], experts=[made[0]], method=Linear())
    assert "modules that BottleneckAdapter puts in, expected changes of the base's weights" in clause


@dataclass(frozen=True, kw_only=True, slots=True)
class Own(BottleneckAdapter):
    """A user's own."""

    @override
    def rewrite(self, model):
        """The same."""
        BottleneckAdapter.rewrite(self, model)


def test_a_rewrite_of_a_users_own_is_refused_before_anything_runs(given):
    (clause,) = tune.problems(**given, method=Own(), training=TRAINING, resources=Resources())
    assert clause.startswith("method: Own rewrites the model, expected a method of this project")


def damaged(folder, source, change):
    """A copy of an adapter with another `lfm.json`, or with other tensors."""
    folder.mkdir()
    said, tensors = json.loads((source / "lfm.json").read_text()), load_file(source / "adapter_model.safetensors")
    change(said, tensors)
    (folder / "lfm.json").write_text(json.dumps(said))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


UP = "model.layers.0.mlp.down_proj.adapter.up.bias"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said, _: said.pop("rewrites"), "has no list of 'rewrites' in its lfm.json"),
        (lambda said, _: said["rewrites"][0].update(method="os/system"), "names the rewrite 'os/system'"),
        (lambda said, _: said["rewrites"][0].update(method="tuning/lora"), "names the rewrite 'tuning/lora'"),
        (
            lambda said, _: said["rewrites"][0]["fields"].update(widht=4),
            "gives tuning/bottleneck_adapter the field 'widht'",
        ),
        (lambda said, _: said["rewrites"][0]["fields"].update(width=0), r"BottleneckAdapter: width=0"),
        (lambda said, tensors: tensors.pop(UP), f"has no tensor '{UP}'"),
        (lambda said, tensors: tensors.update(x=torch.zeros(1)), "has a tensor 'x'"),
        (lambda said, _: said["rewrites"][0]["fields"].update(width=5), r"of shape \(4,\), expected \(5,\)"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(given, made, tmp_path, change, said):
    folder = damaged(tmp_path / "other", made[0].path, change)
    with pytest.raises(RewriteError, match=said) as raised:
        adapted(load(given["model"].path), folder)
    assert str(RewriteError(*raised.value.args)) == str(raised.value)


def test_such_a_folder_is_an_input_and_one_that_cannot_be_read_is_refused_at_plan(made, tmp_path):
    looks = Looks(tmp_path / "digests", None)
    assert looks.check(Adapter(made[0].uri)) is not None
    folder = damaged(tmp_path / "other", made[0].path, lambda said, _: said["rewrites"][0].update(method="os/system"))
    with pytest.raises(InputProblem, match=r"names the rewrite 'os/system'.*expected a method of this version"):
        looks.check(Adapter(str(folder)))
