import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm.deltas import Dense, LowRank, applied, write
from operators.applying import ApplyError, RevertError, apply, revert, stored_name
from operators.artifact import Delta, Model
from operators.data.facts import FactRow, carried, carry
from operators.models.belonging import OtherModel
from operators.models.language_models import load
from tests.operators import small

pytestmark = pytest.mark.slow

MATRIX = "model.layers.0.mlp.down_proj.weight"
FACT = FactRow(subject="a", prompt="b a", target="c")


def changes(seed=0, name=MATRIX, shape=(16, 24)):
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(shape[0], 2, generator=draw), torch.randn(2, shape[1], generator=draw)
    return {name: LowRank(left, right), "model.norm.weight": Dense(torch.randn(16, generator=draw))}


def delta_of(base, folder, delta, digest="f" * 64, facts=(FACT,)):
    folder.mkdir()
    write(delta, folder)
    (folder / "delta.json").write_text(json.dumps({"base": base}))
    carry([], folder, facts)
    return Delta(str(folder), digest)


def weights(model):
    found = {}
    for path in sorted(Path(model.uri).glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.fixture
def model(tmp_path):
    return small.saved(tmp_path / "model")


@pytest.fixture
def delta(tmp_path, model):
    return delta_of(model.digest, tmp_path / "delta", changes())


def test_applied_weights_are_the_models_with_the_changes_added(model, delta, workspace):
    made = apply.body(workspace, model=model, delta=delta)
    before, after = weights(model), weights(made)
    assert before.keys() == after.keys()
    for name, value in before.items():
        added = changes()[name].whole() if name in changes() else torch.zeros_like(value)
        for got, was, more in zip(after[name].flatten(), value.flatten(), added.flatten(), strict=True):
            assert got == was + more
    whole, ids = load(model.path), torch.arange(1, 9)[None]
    with torch.no_grad(), applied(whole, changes()):
        assert torch.equal(load(made.path)(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_what_is_no_weight_goes_along_and_so_do_facts(model, delta, workspace):
    (model.path / "lfm.json").write_text("{}")
    older = FactRow(subject="x", prompt="y x", target="z")
    carry([], model.path, [older])
    made = apply.body(workspace, model=model, delta=delta)
    names = {p.name for p in model.path.iterdir()}
    assert {p.name for p in made.path.iterdir()} == names
    for name in names - {"model.safetensors", "facts.jsonl"}:
        assert (made.path / name).read_bytes() == (model.path / name).read_bytes()
    assert carried(made.path) == [older, FACT]


def test_stored_dtypes_stay(tmp_path, delta, workspace):
    small.model().bfloat16().save_pretrained(tmp_path / "half")
    made = apply.body(workspace, model=Model(str(tmp_path / "half"), "d" * 64), delta=delta)
    before, after = weights(Model(str(tmp_path / "half"))), weights(made)
    assert {v.dtype for v in after.values()} == {torch.bfloat16}
    expected = (before[MATRIX].float() + changes()[MATRIX].whole()).bfloat16()
    assert torch.equal(after[MATRIX], expected)


def test_conv1d_is_changed_as_it_is_stored_and_names_may_lack_their_first_part(tmp_path, workspace):
    model = small.saved(tmp_path / "gpt2", "gpt2")
    name = "transformer.h.1.mlp.c_proj.weight"
    delta = delta_of(model.digest, tmp_path / "delta2", {name: changes(shape=(64, 16))[MATRIX]})
    stored = weights(model)
    bare = tmp_path / "bare"
    shutil.copytree(model.path, bare)
    save_file({k.removeprefix("transformer."): v for k, v in stored.items()}, bare / "model.safetensors")
    made = apply.body(workspace, model=Model(str(bare), "d" * 64), delta=delta)
    expected = stored[name] + changes(shape=(64, 16))[MATRIX].whole()
    assert torch.equal(weights(made)[name.removeprefix("transformer.")], expected)
    assert stored_name("a.b", {"a.b": None, "b": None}) == "a.b"


def test_a_change_of_another_model_is_refused_unless_forced(model, tmp_path, workspace):
    delta = delta_of("e" * 64, tmp_path / "other", changes())
    with pytest.raises(ApplyError) as caught:
        apply.body(workspace, model=model, delta=delta)
    sentence = (
        "delta: made for the model of digest eeeeeeeeeeee, expected the one that apply is given, dddddddddddd. "
        "Give that model, or say force: true."
    )
    assert str(caught.value) == str(ApplyError(*caught.value.args)) == sentence
    assert list(apply.problems(model=model, delta=delta, resources=None, kinds={})) == [sentence]
    made = apply.body(workspace, model=model, delta=delta, force=True)
    assert made.about["base"] == model.digest
    error = OtherModel("apply", "delta", "", "", "Fix.")
    assert str(OtherModel(*error.args)) == str(error)


def test_a_change_that_does_not_fit_is_refused_at_plan(model, tmp_path):
    def said(name, shape, **arguments):
        folder = tmp_path / f"delta-{len(list(tmp_path.iterdir()))}"
        delta = delta_of(model.digest, folder, {name: changes(shape=shape)[MATRIX]})
        return list(apply.problems(**{"model": model, "delta": delta, **arguments}, resources=None, kinds={}))

    assert said(MATRIX, (16, 24)) == []
    assert said(MATRIX, (16, 24), model=None) == []
    (lacking,) = said("model.layers.7.mlp.down_proj.weight", (16, 24))
    assert lacking.startswith("No parameter is called 'model.layers.7.mlp.down_proj.weight'. Did you mean")
    (shape,) = said(MATRIX, (16, 25), force=True)
    assert shape.startswith(f"change of '{MATRIX}' has shape (16, 25), expected (16, 24).")
    config = json.loads((model.path / "config.json").read_text())
    (model.path / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    (quantized,) = said(MATRIX, (16, 24))
    assert quantized.startswith("model: its weights are quantized, expected plain ones.")


def test_what_overflows_is_refused(model, tmp_path, workspace):
    delta = delta_of(model.digest, tmp_path / "huge", {"model.norm.weight": Dense(torch.full((16,), torch.inf))})
    with pytest.raises(ApplyError, match=r"'model.norm.weight' becomes infinite or not a number as torch.float32"):
        apply.body(workspace, model=model, delta=delta)


@pytest.fixture
def stack(model, delta, tmp_path, workspace):
    """A model, what a change made of it, and what another change made of that."""
    once = apply.body(workspace, model=model, delta=delta)
    once = Model(once.uri, "1" * 64, once.about)
    second = delta_of(once.digest, tmp_path / "second", changes(1), digest="a" * 64)
    twice = apply.body(workspace.another(), model=once, delta=second)
    return model, once, Model(twice.uri, "2" * 64, twice.about)


def test_changes_are_a_stack(stack):
    model, once, twice = stack
    first, second = {"base": "d" * 64, "delta": "f" * 64}, {"base": "1" * 64, "delta": "a" * 64}
    assert once.about == {**first, "stack": [first]}
    assert twice.about == {**second, "stack": [first, second]}
    expected = weights(model)[MATRIX] + changes()[MATRIX].whole() + changes(1)[MATRIX].whole()
    torch.testing.assert_close(weights(twice)[MATRIX], expected)


def test_reverting_hands_the_base_on_as_it_is(stack, workspace):
    model, once, twice = stack
    assert revert.body(workspace, model=twice, base=once) is once
    assert revert.body(workspace, model=once, base=model) is model


def test_only_the_last_change_is_taken_away(stack, workspace):
    model, once, twice = stack
    other = Model(model.uri, "b" * 64)
    last = "expected what was changed last."
    for given, sentence in (
        (
            {"model": twice, "base": model},
            f"base: dddddddddddd lies below 1 later change, {last} Revert to 111111111111 first.",
        ),
        (
            {"model": once, "base": other},
            f"base: bbbbbbbbbbbb is not on the way to this model, {last} Give dddddddddddd.",
        ),
        (
            {"model": model, "base": other},
            "model: dddddddddddd was not made by apply, expected a model that was changed. Give what apply made.",
        ),
    ):
        with pytest.raises(RevertError) as caught:
            revert.body(workspace, **given)
        assert str(caught.value) == str(RevertError(*caught.value.args)) == sentence
        assert list(revert.problems(**given, resources=None, kinds={})) == [sentence]
    assert list(revert.problems(model=None, base=model, resources=None, kinds={})) == []
