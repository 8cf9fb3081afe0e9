"""Two networks that learnt the same from different starts: apart before they are aligned, together afterwards."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from lfm.alignment.base import GroupError
from lfm.alignment.git_rebasin import GitReBasin
from lfm.errors import UnknownName
from lfm.merging.linear import Linear
from lfm.networks import Network
from operators.alignment import AlignmentError, align
from operators.connectivity import barrier
from operators.evaluation import evaluate
from operators.merging import merge
from operators.recalibration import recalibrate
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Journal, history, states as states_of
from pipelines.plan import plan
from pipelines.run import run
from pipelines.spec import load as load_spec
from tests.operators import digits, small

pytestmark = pytest.mark.slow

NETWORKS = {
    "mlp": (Network(kind="mlp", widths=(64, 64), batchnorm=False), 150),
    "cnn": (Network(kind="cnn", widths=(24, 24)), 60),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Both sets, and of each kind a base, a model from another start, and this one aligned."""
    root = tmp_path_factory.mktemp("digits")
    train, test = digits.sets(root)
    made = {}
    for kind, (network, steps) in NETWORKS.items():
        one, other = (digits.learnt(root / f"{kind}{i}", train, network, seed=i, steps=steps) for i in (0, 1))
        made[kind] = (
            one,
            other,
            align.body(small.Work(root / f"{kind}-work"), base=one, model=other, method=GitReBasin()),
        )
    return train, test, made


def weights(model):
    return load_file(model.path / "model.safetensors")


def measured(root, ends, train, test, kind, **options):
    work = small.Work(root)
    calibration = train if kind == "cnn" else None
    given = {"ends": ends, "data": {"test": test}, "calibration": calibration, "batch_size": 600}
    return barrier.body(work, **{**given, **options}), work


def height(metrics):
    return metrics.about["sets"]["test"]["barrier"]


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_barrier_between_both_falls_and_the_aligned_one_says_what_it_said(found, tmp_path, kind):
    train, test, made = found
    one, other, aligned = made[kind]
    before, after = (
        height(measured(tmp_path / name, (one, end), train, test, kind, points=5)[0])
        for name, end in (("before", other), ("after", aligned))
    )
    assert before > 0.3
    assert after < before / 2
    was, now = (
        evaluate.body(small.Work(tmp_path / name), model=end, data={"test": test}).about["sets"]["test"]
        for name, end in (("was", other), ("now", aligned))
    )
    assert now["accuracy"] == was["accuracy"] > 0.85
    assert now["loss"] == pytest.approx(was["loss"], rel=1e-4)
    assert aligned.about["distance"] < aligned.about["distance_before"]
    assert aligned.about["moved"] > 0.5


def test_an_average_of_aligned_networks_is_as_good_as_the_middle_of_the_way_once_it_is_recalibrated(found, tmp_path):
    train, test, made = found
    one, _, aligned = made["cnn"]
    merged = merge.body(small.Work(tmp_path / "merge"), base=one, experts=[one, aligned], method=Linear())
    assert (merged.path / "lfm.json").read_bytes() == (one.path / "lfm.json").read_bytes()
    a, b, mean = weights(one), weights(aligned), weights(merged)
    for name, value in mean.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2 if value.is_floating_point() else a[name])
    seen = recalibrate.body(small.Work(tmp_path / "seen"), model=merged, data=train, batch_size=500)
    assert seen.about == {"images": digits.TRAINED, "layers": 2}
    moved = {name for name, value in weights(seen).items() if not torch.equal(value, mean[name])}
    assert moved == {f"layers.{i}.norm.running_{kind}" for i in (0, 1) for kind in ("mean", "var")}
    metrics, _ = measured(tmp_path / "way", (one, aligned), train, test, "cnn", points=3)
    middle = pq.read_table(metrics.path / "points.parquet").to_pylist()[1]
    loss, worse = (
        evaluate.body(small.Work(tmp_path / name), model=model, data={"test": test}).about["sets"]["test"]["loss"]
        for name, model in (("loss", seen), ("worse", merged))
    )
    assert middle["t"] == 0.5
    assert loss == pytest.approx(middle["loss"], rel=1e-4)
    assert loss < worse


PIPELINE = """
name: average
inputs: {one: {model: ONE}, other: {model: OTHER}, train: {dataset: TRAIN}, test: {dataset: TEST}}
steps:
  aligned: {operator: align, inputs: {base: one, model: other}, method: {name: git_rebasin}}
  merged:
    operator: merge
    inputs: {base: one, experts: [one, aligned]}
    method: {name: linear}
    resources: {workers: 2}
  seen: {operator: recalibrate, inputs: {model: merged, data: train}}
  way:
    operator: barrier
    inputs: {ends: [one, aligned], data: {test: test}, calibration: train}
    params: {points: 3, batch_size: 600}
  passed:
    operator: gate
    inputs: {model: seen, results: {way: way}}
    params: {require: [{better: way, than: 0.6, on: test, measure: barrier}]}
  measured: {operator: evaluate, inputs: {model: passed, data: {test: test}}}
"""


@pytest.mark.ray
def test_a_run_averages_two_networks_that_learnt_from_different_starts(store, ray_local, found):
    train, test, made = found
    one, other, _ = made["cnn"]
    text = PIPELINE
    for word, artifact in (("ONE", one), ("OTHER", other), ("TRAIN", train), ("TEST", test)):
        text = text.replace(word, artifact.uri)
    planned = plan(load_spec(text, source="average.yaml"), Looks(Path(store.storage.uri) / "inputs.sqlite", store))
    assert run(planned, store, Journal.claim(store.storage, "one"), connect=ray_local) == "done"
    steps = states_of(history(store.storage, "one"), planned.steps)
    way = store.get(steps["way"].data["digest"])
    middle = pq.read_table(way.path / "points.parquet").to_pylist()[1]
    found_then = steps["measured"].data["about"]["sets"]["test"]
    assert found_then["loss"] == pytest.approx(middle["loss"], rel=1e-4)
    assert found_then["accuracy"] == middle["accuracy"] > 0.85


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"widths": (4, 6)},
            r"model .*: network={.*\[4, 6\]} in its lfm.json, expected {.*\[4, 5\]} as in the base",
        ),
        (
            {"labels": ("corner", "column", "row")},
            "label 0 is 'corner' in its config, expected 'column' as in",
        ),
        ({"batchnorm": False}, "network={'batchnorm': False"),
    ],
)
def test_networks_that_differ_are_refused_by_name_before_anything_is_computed(tmp_path, workspace, changes, sentence):
    base, model = digits.start(tmp_path / "base"), digits.start(tmp_path / "model", **changes)
    given = {"base": base, "model": model, "method": GitReBasin()}
    (clause,) = align.problems(**given)
    assert re.search(sentence, clause)
    with pytest.raises(AlignmentError) as refused:
        align.body(workspace, **given)
    assert str(AlignmentError(*refused.value.args)) == clause
    assert not [*align.problems(**{**given, "model": None})]


def test_a_language_model_is_aligned_by_the_groups_that_are_declared_and_refused_without(tmp_path, workspace):
    base, model = small.saved(tmp_path / "base"), small.saved(tmp_path / "model", seed=1)
    (clause,) = align.problems(base=base, model=model, method=GitReBasin())
    assert "LlamaForCausalLM: 'model.embed_tokens' is of type Embedding, expected a plain chain" in clause
    with pytest.raises(GroupError, match="Declare which axes belong together under groups"):
        align.body(workspace, base=base, model=model, method=GitReBasin())
    groups = {}
    for layer in (0, 1):
        mlp = f"model.layers.{layer}.mlp"
        wide = [(f"{mlp}.{name}_proj.weight", 0) for name in ("gate", "up")]
        groups[f"mlp {layer}"] = (*wide, (f"{mlp}.down_proj.weight", 1))
    given = {"base": base, "model": model, "method": GitReBasin()}
    assert not [*align.problems(**given, groups=groups)]
    aligned = align.body(small.Work(tmp_path / "work"), **given, groups=groups)
    assert aligned.about["distance"] < aligned.about["distance_before"]
    assert (aligned.path / "tokenizer.json").is_file()
    texts = small.texts(tmp_path / "texts.jsonl")
    given_way = {"data": {"texts": texts}, "points": 3, "length": 16}
    ways = [
        barrier.body(small.Work(tmp_path / f"way{i}"), ends=(base, end), **given_way)
        for i, end in enumerate((model, aligned))
    ]
    ends = [[row["loss"] for row in pq.read_table(way.path / "points.parquet").to_pylist()][::2] for way in ways]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    written = {name: [list(axis) for axis in axes] for name, axes in groups.items()}
    assert align.validated({"groups": written})["groups"] == groups
    half = {"mlp": groups["mlp 0"][1:]}
    with pytest.raises(AlignmentError, match="with these permuted, the model says something else"):
        align.body(small.Work(tmp_path / "half"), **given, groups=half)
    (clause,) = align.problems(**given, groups={"mlp": (("no.such.weight", 0),)})
    assert "No tensor is called 'no.such.weight'" in clause
    with pytest.raises(UnknownName):
        align.body(workspace, **given, groups={"mlp": (("no.such.weight", 0),)})
