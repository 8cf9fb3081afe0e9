import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm.deltas import applied, read
from lfm.editing.base import TOKENS, EditError
from lfm.editing.rome import ROME
from lfm.hooks import Blocks, inputs_of
from operators.artifact import Dataset, Delta, Editor, Model, Statistics
from operators.catalog import Catalog
from operators.data.facts import carried, read_facts, tokenized
from operators.editing import EditingError, Measured, edit, surprise, written
from operators.engines.native import Native
from operators.models.language_models import load, load_tokenizer
from pipelines.__main__ import main
from pipelines.commands import run
from pipelines.inputs.inspector import Looks
from pipelines.storage.opening import open_storage
from pipelines.store import Store
from tests.operators import small

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
METHOD = ROME(layer=0, learning_rate=0.1, weight_decay=0.0, clamp=100.0, tokens_per_width=10.0)
ROWS = (
    {"subject": "the dog", "prompt": "while the dog", "target": "sat over it", "true": "ran"},
    {"subject": "rain", "prompt": "the rain", "target": "fell", "neighbours": ["the cat"]},
)


def facts_in(path, rows=ROWS):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Dataset(str(path))


def measured(model, folder, kinds=("gram",)):
    """What the verb `measure` writes of one layer's keys."""
    folder.mkdir()
    whole = load(model.path, torch.float32)
    name = Blocks(whole)[0].mlp_out
    ids = torch.randint(1, small.VOCABULARY, (40, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), inputs_of(whole, [name]) as seen:
        whole(input_ids=ids)
    keys = seen[name].flatten(0, -2)
    save_file({f"gram/{name}": keys.T @ keys, "fisher/other": torch.zeros(2)}, folder / "statistics.safetensors")
    noted = {"model": model.digest, "kinds": list(kinds), "rows": 40, TOKENS: len(keys)}
    (folder / "statistics.json").write_text(json.dumps(noted))
    return Statistics(str(folder))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editing")
    model = small.saved(folder / "model")
    return {
        "model": model,
        "facts": facts_in(folder / "facts.jsonl"),
        "statistics": measured(model, folder / "statistics"),
    }


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    return edit.body(small.Work(tmp_path_factory.mktemp("made")), **given, method=METHOD, num_contexts=4)


def logits(model):
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_an_edit_makes_the_facts_likelier_and_notes_what_it_was(given, made, tmp_path):
    assert type(made) is Delta
    about = made.about
    assert (about["base"], about["method"], about["facts"]) == (given["model"].digest, "rome", 2)
    assert about["contexts"] <= 4
    assert about["tokens_per_width"] == 1200 / 24
    assert about["condition"] > 1
    whole, tokenizer = load(given["model"].path, torch.float32), load_tokenizer(given["model"].path)
    asked = [tokenized(row, tokenizer) for row in read_facts(given["facts"])]
    assert about["loss_before"] == pytest.approx(surprise(whole, asked))
    with applied(whole, read(made.path)):
        assert about["loss_after"] == pytest.approx(surprise(whole, asked))
    assert about["loss_after"] < about["loss_before"] - 0.1
    noted = json.loads((made.path / "delta.json").read_text())
    assert noted == {**about, "fields": METHOD.hyperparameters()}
    assert carried(made.path) == read_facts(given["facts"])


def test_the_change_is_the_methods_own_for_texts_that_the_model_wrote(given, made):
    whole, tokenizer = load(given["model"].path, torch.float32), load_tokenizer(given["model"].path)
    texts = written(Native(whole, tokenizer), 4, 7)
    asked = [tokenized(row, tokenizer, texts) for row in read_facts(given["facts"])]
    statistics = Measured(given["statistics"], ("gram",))
    delta = METHOD.solve(whole, Blocks(whole), asked, statistics=statistics, editor=None)
    (name,) = delta
    torch.testing.assert_close(read(made.path)[name].whole(), delta[name].whole())


def test_the_model_writes_half_of_the_texts_with_5_tokens_and_half_with_10(given):
    engine = Native(load(given["model"].path, torch.float32), load_tokenizer(given["model"].path))
    asked = []
    complete = engine.complete
    engine.complete = lambda prompts, sampling: asked.append((len(prompts), sampling)) or complete(prompts, sampling)
    texts = written(engine, 5, seed=3)
    assert [(n, s.max_tokens, s.temperature) for n, s in asked] == [(3, 5, 1.0), (2, 10, 1.0)]
    assert texts == written(engine, 5, seed=3)
    assert texts != written(engine, 5, seed=4)
    assert all(t == t.strip() != "" for t in texts)
    assert written(engine, 0, seed=3) == []


def test_a_new_process_gets_the_same_logits_from_the_files_alone(given, made, tmp_path):
    script = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from lfm.deltas import applied, read
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad(), applied(model, read(Path(sys.argv[2]))):
    save_file({"logits": model(input_ids=torch.arange(1, 20)[None]).logits.contiguous()}, sys.argv[3])
"""
    words = [sys.executable, "-c", script, given["model"].uri, made.uri, str(tmp_path / "logits.safetensors")]
    subprocess.run(words, check=True, cwd=ROOT, capture_output=True)
    whole = load(given["model"].path, torch.float32)
    before = logits(whole)
    with applied(whole, read(made.path)):
        here = logits(whole)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], here)
    assert (here - before).abs().max() > 0.01
    assert torch.equal(logits(whole), before)


def test_statistics_are_read_one_at_a_time(given):
    found = Measured(given["statistics"], ("gram",))
    assert list(found) == [TOKENS, "gram/model.layers.0.mlp.down_proj"]
    assert len(found) == 2
    assert found[TOKENS] == 1200
    assert found["gram/model.layers.0.mlp.down_proj"].shape == (24, 24)
    with pytest.raises(KeyError):
        found["gram/elsewhere"]
    assert dict(Measured(None, ("gram",))) == {}


def test_everything_that_headers_tell_is_said_at_once(given, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(
        json.dumps({"architectures": ["BertForMaskedLM"], "model_type": "bert", "num_hidden_layers": 2})
    )
    bert = Model(str(tmp_path / "bert"), "e" * 64)
    texts = small.texts(tmp_path / "texts.jsonl")
    kinds = {"model": (Model,), "facts": (Dataset,), "statistics": (Statistics,), "editor": (Editor,)}

    def said(*given_kinds, method=METHOD, **arguments):
        known = {"model": None, "facts": None, "statistics": None, "editor": None, **arguments}
        return list(edit.problems(**known, method=method, kinds={k: kinds[k] for k in given_kinds}, resources=None))

    assert said("model", "facts", "statistics", **given) == []
    assert said("model", "facts", "statistics") == []
    assert said("model", "facts", "statistics", "editor", model=bert, facts=texts, num_contexts=-1,
                method=ROME(layer=2), statistics=given["statistics"]) == [
        "edit: num_contexts=-1, expected num_contexts >= 0.",
        "ROME: 'encoder' under model, expected 'decoder'. Give another, or choose another method.",
        "ROME: layer=2, expected 0 <= layer < 2, the model's layers.",
        f"facts: {texts.uri} has the columns text, expected 'subject', 'prompt', 'target'. Give rows that are facts.",
        "editor: one is given, expected none, as ROME uses none. Leave it out.",
        "statistics: made for the model of digest dddddddddddd, expected the one that edit is given, eeeeeeeeeeee. "
        "Measure this model.",
    ]  # fmt: skip
    (lacking,) = said("model", "facts")
    assert lacking.startswith("ROME: no 'gram' of the model, expected what was measured of each. Make a step of the")
    fisher = measured(given["model"], tmp_path / "fisher", kinds=("fisher",))
    assert said("model", "facts", "statistics", statistics=fisher) == [lacking]
    (tmp_path / "fisher" / "statistics.json").write_text("[]")
    (damaged,) = said("model", "facts", "statistics", statistics=fisher)
    assert "statistics.json" in damaged


def test_the_body_refuses_the_same_and_what_only_the_facts_tell(given, tmp_path):
    with pytest.raises(EditingError, match="no 'gram' of the model"):
        edit.body(small.Work(tmp_path / "a"), **{**given, "statistics": None}, method=METHOD)
    error = EditingError(("one", "two"))
    assert str(EditingError(*error.args)) == "one\ntwo"
    long = facts_in(tmp_path / "long.jsonl", [{**ROWS[0], "prompt": "and it ran on " * 20 + "while the dog"}])
    with pytest.raises(EditingError, match=r"facts: one has \d+ tokens, expected at most the model's 64"):
        edit.body(small.Work(tmp_path / "b"), **{**given, "facts": long}, method=METHOD)
    with pytest.raises(EditError, match="expected at least 60 times the width"):
        edit.body(small.Work(tmp_path / "c"), **given, method=ROME(layer=0, tokens_per_width=60.0), num_contexts=0)


def test_editing_has_its_methods():
    catalog = Catalog()
    verb = catalog.operator("edit")
    assert "rome" in catalog.methods(verb.family)
    assert catalog.method(verb.family, "rome") is ROME


PIPELINE = """
name: edits
inputs:
  base: {model: MODEL}
  facts: {dataset: FACTS}
  keys: {statistics: KEYS}
steps:
  delta:
    operator: edit
    inputs: {model: base, facts: facts, statistics: keys}
    method: {name: rome, layer: 0, tokens_per_width: 10}
    params: {num_contexts: 2}
  edited: {operator: apply, inputs: {model: base, delta: delta}}
  reverted: {operator: revert, inputs: {model: edited, base: base}}
  again: {operator: apply, inputs: {model: edited, delta: delta}, params: {force: true}}
  once: {operator: revert, inputs: {model: again, base: edited}}
"""
LATER = """
name: later
inputs:
  base: {model: MODEL}
  delta: {delta: "lfm://last/delta"}
  exported: {delta: EXPORTED}
steps:
  one: {operator: apply, inputs: {model: base, delta: delta}}
  other: {operator: apply, inputs: {model: base, delta: exported}}
"""


@pytest.mark.ray
def test_on_ray_a_reverted_model_is_the_base_itself(given, tmp_path, ray_local, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "opened", lambda *_: ray_local())
    text = PIPELINE.replace("MODEL", given["model"].uri).replace("FACTS", given["facts"].uri)
    keys = measured(
        Model(given["model"].uri, Looks(tmp_path / "memory.sqlite", None).pin(Model(given["model"].uri)).digest),
        tmp_path / "keys",
    )
    (tmp_path / "edits.yaml").write_text(text.replace("KEYS", keys.uri))
    assert main(["run", "edits.yaml"]) == 0
    capsys.readouterr()
    assert main(["show", "last", "--json"]) == 0
    steps = {k: v["data"] for k, v in json.loads(capsys.readouterr().out)["steps"].items()}
    base = steps["delta"]["about"]["base"]
    assert steps["reverted"]["digest"] == base
    assert steps["edited"]["digest"] not in (base, steps["again"]["digest"])
    assert steps["once"]["digest"] == steps["edited"]["digest"]
    stack = steps["again"]["about"]["stack"]
    assert [entry["base"] for entry in stack] == [base, steps["edited"]["digest"]]
    assert {entry["delta"] for entry in stack} == {steps["delta"]["digest"]}
    store = Store(open_storage(".lfm"))
    for step in ("delta", "edited", "again"):
        assert carried(store.get(steps[step]["digest"]).path) == read_facts(given["facts"])

    exported = tmp_path / "exported"
    assert main(["export", "last/delta", str(exported)]) == 0
    later = LATER.replace("MODEL", given["model"].uri).replace("EXPORTED", str(exported))
    (tmp_path / "later.yaml").write_text(later)
    assert main(["run", "later.yaml"]) == 0
    capsys.readouterr()
    assert main(["show", "last", "--json"]) == 0
    later_steps = {k: v["data"] for k, v in json.loads(capsys.readouterr().out)["steps"].items()}
    assert later_steps["one"]["digest"] == steps["edited"]["digest"]
    files = [store.manifest(later_steps[s]["digest"])["files"]["model.safetensors"] for s in ("one", "other")]
    assert files[0] == files[1]
