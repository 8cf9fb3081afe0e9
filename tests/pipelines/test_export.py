"""What comes out of the store, as others load it."""

import json
import os
import shutil
import stat

import peft
import pytest
import torch
import transformers
import yaml

from lfm.deltas import Dense, read, write
from lfm.tuning.bottleneck_adapter import BottleneckAdapter
from operators.models import rewrites
from pipelines.__main__ import main
from pipelines.storage.base import digest_of
from pipelines.store import Result
from tests.operators import small

IDS = torch.tensor([[5, 17, 203, 44, 8]])
OUTSIDE = {"kind": "dataset", "digest": "d" * 64, "uri": "hf://openai/gsm8k@abc"}
TRAINING = {"max_steps": 20, "learning_rate": 0.0001}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def put(store, folder, kind, about=None):
    """Copy a folder into the store."""
    scratch = store.storage.scratch()
    shutil.copytree(folder, scratch, dirs_exist_ok=True)
    (scratch / "README.md").unlink(missing_ok=True)
    return store.put(scratch, kind, about or {})


def commit(store, step, operator, digest, kind, inputs, *, method=None, about=None):
    components = {"operator": operator, "method": method, "params": TRAINING if method else {}}
    result = Result(fingerprint=step, kind=kind, digest=digest, run="r", step=step, inputs=inputs,
                    components=components, about=about or {})  # fmt: skip
    store.commit(result)


def of(digest, kind="model"):
    return {"kind": kind, "digest": digest, "uri": ""}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model and an adapter of it, as transformers and PEFT write them."""
    home = tmp_path_factory.mktemp("models")
    small.saved(home / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "model")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(home / "adapter")
    return home


@pytest.fixture
def made(store, folders):
    """A merged model, evaluated and gated, and an adapter of it."""
    merged = put(store, folders / "model", "model")
    adapter = put(store, folders / "adapter", "adapter", {"base": merged})
    scores = {"documents": 12, "loss": 1.25, "perplexity": 3.4903, "chrf": 0.5}
    metrics = store.storage.scratch()
    (metrics / "metrics.json").write_text("{}")
    metrics = store.put(metrics, "metrics", {"sets": {"held_out": scores}})
    commit(store, "merged", "merge", merged, "model", {"experts": [OUTSIDE]},
           method=["ties", {"density": 0.2, "scale": 1.0}])  # fmt: skip
    commit(
        store, "measured", "evaluate", metrics, "metrics", {"model": of(merged)}, about={"sets": {"held_out": scores}}
    )
    commit(store, "gated", "gate", merged, "model", {"model": of(merged), "results": {"m": of(metrics, "metrics")}},
           about={"gate": [{"said": "loss of merged minus student is -0.5"}]})  # fmt: skip
    commit(
        store, "tuned", "tune", adapter, "adapter", {"model": of(merged), "data": OUTSIDE}, method=["lora", {"rank": 2}]
    )
    return {"merged": merged, "adapter": adapter, "metrics": metrics}


@pytest.fixture
def export(store, capsys):
    def export_(digest, folder, *words):
        code = main(["export", digest, str(folder), "--store", store.storage.uri, *words])
        return code, *capsys.readouterr()

    return export_


def card(folder):
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_model_is_loaded_by_transformers_and_computes_the_same(export, made, folders, tmp_path):
    code, out, _ = export(made["merged"], tmp_path / "out")
    assert code == 0
    assert f"model digest {made['merged']} is in {tmp_path / 'out'}" in out
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(there), logits(transformers.AutoModelForCausalLM.from_pretrained(folders / "model")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the cat").input_ids == small.tokenizer()("the cat").input_ids


def test_what_is_exported_can_be_changed_and_the_store_stays_as_it_is(export, made, store, tmp_path):
    export(made["merged"], tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & stat.S_IWUSR
        path.write_text("changed")
    assert store.whole(made["merged"], bytes_too=True)


def test_an_adapter_is_loaded_by_peft_with_its_base_beside_it(export, made, store, folders, tmp_path):
    code, out, _ = export(made["adapter"], tmp_path / "out", "--json")
    assert code == 0
    said = json.loads(out)
    assert (said["kind"], said["digest"], said["base"]) == ("adapter", made["adapter"], str(tmp_path / "out" / "base"))
    assert said["files"]["adapter_model.safetensors"] == os.path.getsize(
        folders / "adapter" / "adapter_model.safetensors"
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(folders / "model")
    plain = logits(base)
    wanted = logits(peft.PeftModel.from_pretrained(base, folders / "adapter"))
    assert not torch.allclose(wanted, plain)
    there = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(there), wanted)
    assert store.whole(made["adapter"], bytes_too=True)


@pytest.mark.parametrize(
    ("uri", "written"),
    [
        ("hf://some/model@0123abc", {"base_model_name_or_path": "some/model", "revision": "0123abc"}),
        ("/models/x", {"base_model_name_or_path": "/models/x", "revision": None}),
    ],
)
def test_an_adapter_of_a_model_from_outside_names_it(export, store, folders, tmp_path, uri, written):
    adapter = put(store, folders / "adapter", "adapter", {"base": "b" * 40})
    base = {"kind": "model", "digest": "b" * 40, "uri": uri}
    commit(store, "tuned", "tune", adapter, "adapter", {"model": base, "data": OUTSIDE}, method=["lora", {"rank": 2}])
    assert export(adapter, tmp_path / "out")[0] == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {k: config[k] for k in written} == written
    assert not (tmp_path / "out" / "base").exists()
    front, text = card(tmp_path / "out")
    assert front["library_name"] == "peft"
    assert front.get("base_model") == (["some/model"] if uri.startswith("hf://") else None)
    assert f"Its base is `{written['base_model_name_or_path']}`" in text


def test_an_adapter_of_this_projects_own_is_loaded_as_its_card_says(
    export, made, store, folders, tmp_path, monkeypatch
):
    method = BottleneckAdapter(width=2, norms=False, init=0.5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "model")
    before = {n for n, _ in model.named_parameters()}
    method.rewrite(model)
    tensors = {n: p.detach() for n, p in model.named_parameters() if n not in before}
    rewrites.write(tmp_path / "own", method, tensors, base=made["merged"])
    adapter = put(store, tmp_path / "own", "adapter", {"base": made["merged"]})
    commit(store, "own", "tune", adapter, "adapter", {"model": of(made["merged"]), "data": OUTSIDE},
           method=["bottleneck_adapter", {"width": 2}])  # fmt: skip
    assert export(adapter, tmp_path / "out")[0] == 0
    front, text = card(tmp_path / "out")
    assert front["library_name"] == "learn-from-model"
    monkeypatch.chdir(tmp_path / "out")
    there = {}
    exec(text.split("```python\n")[1].split("```")[0], there)
    torch.testing.assert_close(logits(there["model"]), logits(model))


def test_an_adapter_whose_base_nobody_knows_is_not_exported(export, store, folders, tmp_path):
    adapter = put(store, folders / "adapter", "adapter", {"base": "b" * 64})
    code, _, err = export(adapter, tmp_path / "out")
    assert code == 2
    assert "is an adapter of digest bbbbbbbbbbbb, expected a base that its lineage or the store knows" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_the_card_says_what_it_came_from_how_and_what_was_measured(export, made, tmp_path):
    export(made["merged"], tmp_path / "out")
    front, text = card(tmp_path / "out")
    assert front["datasets"] == ["openai/gsm8k"]
    assert front["library_name"] == "transformers"
    assert {"learn-from-model", "ties"} <= set(front["tags"])
    for said in (
        f"model gated (gate) digest {made['merged']}",
        f"model: model merged (merge) ties digest {made['merged']}",
        f"experts[0]: dataset {OUTSIDE['uri']} digest {OUTSIDE['digest']}",
        "- `merged`: merge with ties ([arXiv:2306.01708](https://arxiv.org/abs/2306.01708)): density=0.2, scale=1.0. "
        "Parameters: learning_rate=0.0001, max_steps=20.",
        f"- dataset `{OUTSIDE['uri']}`, digest `{OUTSIDE['digest']}`",
        "| measured | held_out | 12 | 1.25 | 3.49 |  | 0.5 |",
        "- loss of merged minus student is -0.5",
    ):
        assert said in text


@pytest.mark.parametrize(("there", "said"), [("file", "is a file"), ("folder", "is not empty")])
def test_what_lies_there_already_is_left_alone(export, made, tmp_path, there, said):
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    code, _, err = export(made["merged"], out)
    assert code == 2
    assert f"{said}, expected a new or an empty folder. Give another." in err
    assert (out if there == "file" else out / "mine").read_text() == "mine"


def test_a_change_of_weights_comes_out_as_it_is(export, store, tmp_path):
    there = tmp_path / "delta"
    there.mkdir()
    write({"w": Dense(torch.ones(2))}, there)
    (there / "delta.json").write_text("{}")
    digest = put(store, there, "delta")
    out = tmp_path / "out"
    assert export(digest, out)[0] == 0
    assert {p.name for p in out.iterdir()} == {"delta.json", "delta.safetensors"}
    assert torch.equal(read(out)["w"].whole(), torch.ones(2))


def test_what_is_no_model_is_refused(export, made, tmp_path):
    code, _, err = export(made["metrics"], tmp_path / "out")
    assert code == 2
    assert "is a metrics, expected one of model, adapter, delta" in err


def test_a_byte_that_flipped_in_the_store_does_not_come_out(export, made, store, tmp_path):
    path = store.storage.root / "artifacts" / made["merged"] / "model.safetensors"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert digest_of(path) != store.manifest(made["merged"])["files"]["model.safetensors"]["sha256"]
    code, _, err = export(made["merged"], tmp_path / "out")
    assert code == 2
    assert "'model.safetensors' is not what the manifest says" in err
    assert list((tmp_path / "out").iterdir()) == []
