"""Two networks that learnt the same from different starts: apart before they are aligned, together afterwards."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from lfm.alignment.base import GroupError, at
from lfm.alignment.git_rebasin import GitReBasin
from lfm.errors import HyperparameterError, UnknownName
from lfm.merging.linear import Linear
from lfm.merging.passthrough import Passthrough
from lfm.networks import ImageNetwork, Network
from lfm.recalibration import recalibrate as recalibrated
from operators.alignment import AlignmentError, align
from operators.artifact import Model
from operators.connectivity import BarrierError, barrier
from operators.data.images import read_images
from operators.evaluation import evaluate
from operators.gating import GateClosed, Requirement, gate
from operators.merges.experts import MergeError
from operators.merging import merge
from operators.models.networks import load, save
from operators.recalibration import NoNormalisation, recalibrate
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


def test_a_barrier_is_what_a_loop_over_the_way_finds(found, tmp_path):
    train, test, made = found
    one, other, _ = made["cnn"]
    metrics, work = measured(tmp_path / "way", (one, other), train, test, "cnn", points=5, batch_size=100)
    ends = [load(model.path).state_dict() for model in (one, other)]
    images, seen = read_images(test), read_images(train)
    network, losses = load(one.path), []
    right = torch.tensor([digits.LABELS.index(label) for label in images.labels])
    for i in range(5):
        network.load_state_dict(at(ends, i / 4))
        recalibrated(network, lambda: network(torch.from_numpy(seen.pixels)))
        with torch.no_grad():
            said = network(torch.from_numpy(images.pixels)).log_softmax(dim=1)
        losses.append(float(-said[torch.arange(len(right)), right].mean()))
    table = pq.read_table(metrics.path / "points.parquet").to_pydict()
    assert table["loss"] == pytest.approx(losses, rel=1e-4)
    assert table["t"] == [0, 0.25, 0.5, 0.75, 1]
    assert set(table["set"]) == {"test"}
    rises = [loss - ((1 - i / 4) * losses[0] + i / 4 * losses[4]) for i, loss in enumerate(losses)]
    assert height(metrics) == pytest.approx(max(rises), rel=1e-4)
    assert metrics.about["sets"]["test"]["at"] == table["t"][rises.index(max(rises))]
    assert json.loads((metrics.path / "metrics.json").read_text())["sets"] == metrics.about["sets"]
    assert [told["done"] for told in work.told] == [1, 2, 3, 4, 5]
    rule = Requirement(better="way", than=0.0, on="test", measure="barrier")
    with pytest.raises(GateClosed, match=r"barrier of way on test is \d.*, where at most 0 is required"):
        gate.body(work, model=one, results={"way": metrics}, require=(rule,))
    rule = Requirement(better="way", than="other", on="test", measure="barrier")
    (clause,) = gate.problems(results={"way": None, "other": None}, require=(rule,))
    assert "barrier is compared with 'other', expected a number" in clause


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
    params: {require: [{better: way, than: 0.3, on: test, measure: barrier}]}
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


def tiny(folder, *, seed=0, labels=("no", "yes"), **changes):
    torch.manual_seed(seed)
    network = ImageNetwork(Network(**{"kind": "cnn", "widths": (4, 5), **changes}), (1, 8, 8), len(labels))
    save(network, {}, labels, folder)
    return Model(str(folder))


def test_networks_that_differ_are_refused_by_name_before_anything_is_computed(tmp_path, workspace):
    base = tiny(tmp_path / "base")
    for changes, sentence in (
        ({"widths": (4, 6)}, "widths"),
        ({"labels": ("yes", "no")}, "label 0 is 'yes' in its config, expected 'no' as in the base's. Align models"),
        ({"batchnorm": False}, "network="),
    ):
        model = tiny(tmp_path / f"other {sentence[:8]}".strip(), **changes)
        clauses = "\n".join(align.problems(base=base, model=model, method=GitReBasin(), kinds={}))
        assert sentence in clauses
        with pytest.raises(AlignmentError) as refused:
            align.body(workspace, base=base, model=model, method=GitReBasin())
        assert str(AlignmentError(*refused.value.args)) == clauses
        assert any(
            sentence.split(". ")[0] in c
            for c in barrier.problems(ends=(base, model), data={"test": None}, kinds={"calibration": ()})
        )
        with pytest.raises(MergeError):
            merge.body(workspace, base=base, experts=[model], method=Linear())
    assert not [*align.problems(base=base, model=None, method=GitReBasin(), kinds={})]


def test_layers_of_a_network_are_not_stacked(tmp_path):
    base = tiny(tmp_path / "base")
    method = Passthrough(slices=((0, 0, 1), (0, 0, 1)))
    (clause,) = merge.problems(base=base, experts=[base], method=method)
    assert "base: a network for images, whose layers are of widths of their own" in clause


def test_a_language_model_is_aligned_by_the_groups_that_are_declared_and_refused_without(tmp_path, workspace):
    base, model = small.saved(tmp_path / "base"), small.saved(tmp_path / "model", seed=1)
    (clause,) = align.problems(base=base, model=model, method=GitReBasin(), kinds={})
    assert "LlamaForCausalLM: 'model.embed_tokens' is of type Embedding, expected a plain chain" in clause
    with pytest.raises(GroupError, match="Declare which axes belong together under groups"):
        align.body(workspace, base=base, model=model, method=GitReBasin())
    groups = {}
    for layer in (0, 1):
        mlp = f"model.layers.{layer}.mlp"
        wide = [(f"{mlp}.{name}_proj.weight", 0) for name in ("gate", "up")]
        groups[f"mlp {layer}"] = (*wide, (f"{mlp}.down_proj.weight", 1))
    given = {"base": base, "model": model, "method": GitReBasin()}
    assert not [*align.problems(**given, groups=groups, kinds={})]
    aligned = align.body(small.Work(tmp_path / "work"), **given, groups=groups)
    assert aligned.about["distance"] < aligned.about["distance_before"]
    assert (aligned.path / "tokenizer.json").is_file()
    texts = small.texts(tmp_path / "texts.jsonl")
    ways = [
        barrier.body(small.Work(tmp_path / f"way{i}"), ends=(base, end), data={"texts": texts},
                     points=3, length=16)
        for i, end in enumerate((model, aligned))
    ]  # fmt: skip
    ends = [[row["loss"] for row in pq.read_table(way.path / "points.parquet").to_pylist()][::2] for way in ways]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    written = {name: [list(axis) for axis in axes] for name, axes in groups.items()}
    assert align.validated({"groups": written})["groups"] == groups
    half = {"mlp": groups["mlp 0"][1:]}
    with pytest.raises(AlignmentError, match="with these permuted, the model says something else"):
        align.body(small.Work(tmp_path / "half"), **given, groups=half)
    (clause,) = align.problems(**given, groups={"mlp": (("no.such.weight", 0),)}, kinds={})
    assert "No tensor is called 'no.such.weight'" in clause
    with pytest.raises(UnknownName):
        align.body(workspace, **given, groups={"mlp": (("no.such.weight", 0),)})


def test_what_has_no_batch_normalisation_is_not_recalibrated(tmp_path, workspace):
    images = small.images(tmp_path / "images")
    for model, what in (
        (tiny(tmp_path / "plain", batchnorm=False), "a network without any"),
        (small.saved(tmp_path / "text"), "a causal language model"),
    ):
        (clause,) = recalibrate.problems(model=model, data=images)
        assert f"is {what}, expected a network with batch normalisation" in clause
        with pytest.raises(NoNormalisation, match=what):
            recalibrate.body(workspace, model=model, data=images)
    with pytest.raises(HyperparameterError, match="recalibrate: batch_size=0"):
        recalibrate.body(workspace, model=model, data=images, batch_size=0)


def test_a_way_that_cannot_be_looked_at_fairly_is_refused(tmp_path, workspace):
    normalised, plain = tiny(tmp_path / "one"), tiny(tmp_path / "plain", batchnorm=False)
    images = small.images(tmp_path / "images")
    for ends, calibration, sentence in (
        ((normalised,), None, "1 models under ends, expected 2"),
        ((normalised, normalised), None, "no calibration, expected images"),
        ((plain, plain), images, "calibration is given, expected none"),
    ):
        kinds = {} if calibration is None else {"calibration": ()}
        clauses = [*barrier.problems(ends=ends, data={"test": images}, calibration=calibration, kinds=kinds)]
        assert any(sentence in clause for clause in clauses)
        with pytest.raises(BarrierError, match=sentence):
            barrier.body(workspace, ends=ends, data={"test": images}, calibration=calibration)
    clauses = [*barrier.problems(ends=(plain, plain), data={}, kinds={}, points=2)]
    assert any("points=2, expected points >= 3" in clause for clause in clauses)
    assert any("data is empty" in clause for clause in clauses)
    with pytest.raises(HyperparameterError):
        barrier.body(workspace, ends=(plain, plain), data={"test": images}, points=2)
