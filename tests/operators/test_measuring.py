"""What is measured of a model, against what plain loops over its documents find."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm.errors import HyperparameterError
from lfm.merging.fisher import FisherMerging
from operators.artifact import Adapter
from operators.catalog import Catalog
from operators.data.batches import documents
from operators.data.rows import read_rows
from operators.measures.observing import PARTS, Pass, observed
from operators.measuring import measure
from operators.merges.experts import MergeError
from operators.merging import merge
from operators.models.changed_models import BaseNeeded
from operators.models.language_models import UnsupportedModel, load, load_tokenizer
from operators.resources import Resources
from operators.sharing.notices import FolderNotShared, Preempted
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Journal, history, states
from pipelines.plan import plan, survey
from pipelines.run import run
from pipelines.spec import parsed
from pipelines.text import Text
from tests.operators import small

pytestmark = pytest.mark.slow

BOTH = {"statistics": ("fisher", "gram"), "length": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.saved(tmp_path_factory.mktemp("given") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 40)


def measured(artifact):
    return load_file(artifact.path / "statistics.safetensors")


def each(model, data):
    """The model, and each document with the places from which an answer token is told."""
    whole, tokenizer = load(model.path, torch.float32), load_tokenizer(model.path)
    for document in documents(read_rows(data).to_pydict(), tokenizer):
        ids = torch.tensor(document.ids)[None]
        asked = [i for i in range(len(document.ids) - 1) if document.answer[i + 1]]
        yield whole, ids, asked


def test_the_empirical_fisher_of_a_decoder_is_the_mean_of_its_documents_squared_gradients(workspace, model, data):
    got = measure.body(workspace, model=model, data=data, labels="data", length=32)
    total, number = {}, 0
    for whole, ids, asked in each(model, data):
        logits = whole(input_ids=ids).logits[0].log_softmax(-1)
        whole.zero_grad()
        sum(logits[i, ids[0, i + 1]] for i in asked).backward()
        for name, parameter in whole.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad.double() ** 2
        number += 1
    found = measured(got)
    assert found.keys() == {f"fisher/{name}" for name in total}
    for name, value in total.items():
        torch.testing.assert_close(found[f"fisher/{name}"], (value / number).float(), rtol=1e-3, atol=1e-9)
    assert got.about["rows"] == number
    assert json.loads((got.path / "statistics.json").read_text()) == got.about


def test_drawn_labels_are_those_of_the_seed_and_differ_from_the_datas(model, data, workspace):
    def of(**params):
        return measured(measure.body(workspace.another(), model=model, data=data, length=32, max_rows=4, **params))

    one, same, other, empirical = of(), of(seed=0), of(seed=1), of(labels="data")
    name = "fisher/model.norm.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], empirical[name])


def test_the_gram_of_keys_counts_no_padding_and_nothing_after_the_last_answer_token(workspace, model, data):
    got = measure.body(workspace, model=model, data=data, statistics=("gram",), length=32, batch_size=7)
    found, total, tokens = measured(got), {}, 0
    assert found.keys() == {f"gram/model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    for whole, ids, asked in each(model, data):
        caught = {}
        handles = [
            whole.get_submodule(n.removeprefix("gram/")).register_forward_pre_hook(
                lambda module, arguments, n=n, caught=caught: caught.update({n: arguments[0][0]})
            )
            for n in found
        ]
        with torch.no_grad():
            whole(input_ids=ids[:, : asked[-1] + 1])
        for handle in handles:
            handle.remove()
        tokens += asked[-1] + 1
        for name, keys in caught.items():
            total[name] = total.get(name, 0) + sum(torch.outer(k.double(), k.double()) for k in keys)
    for name, value in total.items():
        torch.testing.assert_close(found[name], value.float(), rtol=1e-4, atol=1e-6)
        low, high = got.about["eigenvalues"][name.removeprefix("gram/")]
        spectrum = np.linalg.eigvalsh(value.numpy())
        assert (low, high) == pytest.approx((spectrum[0], spectrum[-1]), rel=1e-3)
    assert got.about["tokens"] == tokens
    assert got.about["tokens_per_width"] == tokens / 24


def test_a_parameter_has_each_name_that_the_files_have_for_it(workspace, tmp_path, data):
    """A tied head may be stored twice, and a trunk's files leave out what its model calls it."""
    given = small.saved(tmp_path / "gpt2", "gpt2")
    file = given.path / "model.safetensors"
    stored = {n.removeprefix("transformer."): w for n, w in load_file(file).items()}
    stored["lm_head.weight"] = stored["wte.weight"].clone()
    save_file(stored, file, metadata={"format": "pt"})
    found = measured(measure.body(workspace, model=given, data=data, length=32, max_rows=2))
    assert found.keys() == {f"fisher/{name}" for name in stored}
    assert torch.equal(found["fisher/lm_head.weight"], found["fisher/wte.weight"])
    save_file({n: w for n, w in stored.items() if n != "ln_f.bias"}, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"its files store nothing as 'transformer\.ln_f\.bias'"):
        measure.body(workspace.another(), model=given, data=data, length=32, max_rows=2)


def test_an_adapter_stands_for_the_model_that_it_makes_of_its_base(workspace, tmp_path, model, data):
    import peft

    changed = peft.get_peft_model(load(model.path), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in changed.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    changed.save_pretrained(tmp_path / "adapter")
    adapter = Adapter(str(tmp_path / "adapter"), "a" * 64, {"base": model.digest})
    changed.merge_and_unload().save_pretrained(tmp_path / "whole")
    small.tokenizer().save_pretrained(tmp_path / "whole")
    whole = replace(model, uri=str(tmp_path / "whole"))
    got = measure.body(workspace, model=adapter, base=model, data=data, **BOTH)
    wanted = measured(measure.body(workspace.another(), model=whole, data=data, **BOTH))
    for name, value in measured(got).items():
        torch.testing.assert_close(value, wanted[name])
    assert got.about["model"] == "a" * 64
    with pytest.raises(BaseNeeded, match="measure: base is none"):
        measure.body(workspace.another(), model=adapter, data=data)


def test_experts_are_merged_by_what_was_measured_of_each(workspace, tmp_path, model, data):
    experts = [replace(small.saved(tmp_path / f"{seed}", seed=seed), digest=f"{seed}" * 64) for seed in (1, 2)]
    params = {"data": data, "length": 32, "max_rows": 8}
    statistics = [measure.body(workspace.another(), model=e, **params) for e in experts]
    given = {"base": model, "experts": experts, "method": FisherMerging()}
    merged = load_file(merge.body(workspace, **given, statistics=statistics).path / "model.safetensors")
    weights = [load_file(e.path / "model.safetensors") for e in experts]
    fishers = [measured(s) for s in statistics]
    norms = [sum((v.double() ** 2).sum() for v in f.values()).sqrt() for f in fishers]
    for name, value in merged.items():
        shares = [f[f"fisher/{name}"].clamp(min=1e-6) / norm for f, norm in zip(fishers, norms, strict=True)]
        wanted = sum(s * w[name] for s, w in zip(shares, weights, strict=True)) / sum(shares)
        torch.testing.assert_close(value, wanted.float(), rtol=1e-4, atol=1e-6)
    with pytest.raises(MergeError, match=r"FisherMerging: no 'fisher' of the experts.*'measure'"):
        merge.body(workspace.another(), **given)
    with pytest.raises(MergeError, match=f"measured of '{'2' * 64}', expected experts"):
        merge.body(workspace.another(), **given, statistics=statistics[::-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model, data):
    work = small.Work(tmp_path_factory.mktemp("alone"))
    return measure.body(work, model=model, data=data, **BOTH), work


def same_bytes(one, other):
    return all((one.path / f).read_bytes() == (other.path / f).read_bytes() for f in SAVED)


SAVED = ("statistics.safetensors", "statistics.json")


def test_a_step_whose_machine_goes_keeps_its_sums_and_another_goes_on_to_the_same_bytes(workspace, model, data, alone):
    whole, undisturbed = alone
    assert [line["done"] for line in undisturbed.told] == [*range(2, 17, 2), *range(17, 41)]
    assert {line["total"] for line in undisturbed.told} == {40}
    workspace.goes_at = 5
    with pytest.raises(Preempted, match=f"all {PARTS} steps"):
        measure.body(workspace, model=model, data=data, **BOTH)
    again = workspace.another()
    again.checkpoints = workspace.checkpoints
    got = measure.body(again, model=model, data=data, **BOTH)
    assert same_bytes(got, whole)
    assert len(again.told) == PARTS - 5


@pytest.mark.ray
@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(one_ray, tmp_path, model, data, alone, store, ray_local):
    work = small.Work(tmp_path / "three", Resources(workers=3, cpus_per_worker=0.5))
    three = measure.body(work, model=model, data=data, **BOTH)
    assert same_bytes(three, alone[0])
    assert not list((work.scratch / "pass").glob("part-*"))

    made = planned(model, data, store, {"workers": 2})
    assert made.steps["of"].starts_workers
    assert not planned(model, data, store, {}).steps["of"].starts_workers
    journal = Journal.claim(store.storage, "one")
    assert run(made, store, journal, connect=ray_local) == "done"
    (step,) = states(history(store.storage, "one"), made.steps).values()
    two = store.get(step.data["digest"])
    assert (two.path / SAVED[0]).read_bytes() == (alone[0].path / SAVED[0]).read_bytes()
    assert step.data["about"]["kinds"] == ["fisher", "gram"]

    job = Pass(model=model, base=None, statistics=(), home=tmp_path / "elsewhere", rows=4, batch_size=1)
    with pytest.raises(FolderNotShared, match="expected the store on storage that every machine mounts"):
        observed(small.Work(tmp_path / "none", work.resources), job)


PIPELINE = """
name: measured
inputs:
  model: {model: MODEL}
  data: {dataset: DATA}
steps:
  of:
    operator: measure
    inputs: {model: model, data: data}
    params: PARAMS
    resources: RESOURCES
"""


def pipeline(model, data, params, resources):
    text = PIPELINE.replace("MODEL", str(model.path)).replace("DATA", data.uri)
    return Text(text.replace("PARAMS", json.dumps(params)).replace("RESOURCES", json.dumps(resources)), "measured.yaml")


def planned(model, data, store, resources):
    text = pipeline(model, data, {**BOTH, "statistics": ["fisher", "gram"]}, resources)
    return plan(parsed(text).spec, Looks(Path(store.storage.uri) / "inputs.sqlite", store))


def test_a_plan_hears_of_everything_at_once(tmp_path, store, model, data):
    def said(given=model, resources=None, **params):
        draft = parsed(pipeline(given, data, params, resources or {}))
        looks = Looks(tmp_path / "inputs.sqlite", store)
        problems = [*draft.problems, *survey(draft.spec, looks, Catalog())] if draft.spec else draft.problems
        return "\n".join(draft.places.sentences(problems))

    assert said(length=32) == ""
    assert "fisher" in said(statistics=["fishr"])
    found = said(
        length=65, max_rows=0, batch_size=0, seed=-1, statistics=["fisher", "fisher"], layers=[1], labels="exact"
    )
    for clause in (
        "length=65, expected at most the 64 tokens that the model is made for",
        "max_rows=0, expected max_rows >= 1 or none",
        "batch_size=0, expected batch_size >= 1",
        "seed=-1, expected seed >= 0",
        "statistics=('fisher', 'fisher'), expected one or more of fisher, gram, each once",
        "layers=(1,), expected none, or some layers, each once, with 'gram' under statistics",
        "labels='exact' of a model that tells tokens, expected 'sampled' or 'data'",
    ):
        assert clause in found
    assert "layer 2, expected one of its layers 0 to 1" in said(length=32, statistics=["gram"], layers=[2])
    assert "'zero1' for 'measure', which trains nothing" in said(length=32, resources={"strategy": "zero1"})
    assert f"workers=33, expected at most {PARTS}" in said(length=32, resources={"workers": 33})
    bloom = small.saved(tmp_path / "bloom", "bloom")
    assert "gram" not in said(bloom, length=32)


def test_what_a_plan_would_have_refused_is_refused_without_one(workspace, model, data):
    with pytest.raises(HyperparameterError, match="measure: length=1, expected length >= 2"):
        measure.body(workspace, model=model, data=data, length=1)
    assert not workspace.told
