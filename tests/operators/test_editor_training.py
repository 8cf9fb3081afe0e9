"""The verb `train_editor`, and `edit` with what it made."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm.deltas import applied, read as load_delta
from lfm.editing.mend import MEND, factors
from lfm.editing.rome import ROME
from lfm.hooks import Blocks
from operators.artifact import Dataset, Editor, Model
from operators.base import Resources
from operators.catalog import Catalog
from operators.data.batches import IGNORED, on_device
from operators.data.facts import read_facts, spoken, tokenized
from operators.data.row_files import DatasetError
from operators.editing import EditingError, edit
from operators.editor_training import EditedModel, NextTexts, lessons, train_editor
from operators.models.editors import DamagedEditor, read as read_editor
from operators.models.language_models import load, load_tokenizer
from operators.models.texts import packed_rows
from operators.training import Training
from pipelines.inputs.inspector import Looks
from pipelines.lineage import Journal, history, states
from pipelines.plan import plan
from pipelines.run import run
from pipelines.spec import parsed
from pipelines.text import Text
from tests.operators import small

pytestmark = pytest.mark.slow

METHOD = MEND(num_blocks=2, rank=16, rate=1e-2, rate_speed=1.0, edit_weight=1.0)
TRAINING = Training(max_steps=30, batch_size=4, length=32, learning_rate=1e-2, schedule="constant", seed=1)


def facts_in(path, number, seed):
    """Facts that are drawn, every other one with two paraphrases."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        subject, answer = draw.choice(small.WORDS, 2)
        asked = [f"{' '.join(draw.choice(small.WORDS, 3))} {subject}" for _ in range(3)]
        paraphrases = asked[1:] if i % 2 else []
        rows.append({"subject": subject, "prompt": asked[0], "target": answer, "paraphrases": paraphrases})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(str(path))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    model = small.saved(folder / "model")
    weights = load_file(model.path / "model.safetensors")
    weights["lm_head.weight"] *= 20  # so that the model can be sure of something
    save_file(weights, model.path / "model.safetensors", metadata={"format": "pt"})
    return {
        "model": model,
        "data": facts_in(folder / "facts.jsonl", 36, 3),
        "locality": small.texts(folder / "texts.jsonl"),
    }


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    work = small.Work(tmp_path_factory.mktemp("made"))
    training = replace(TRAINING, validate_every=TRAINING.max_steps)
    return train_editor.body(work, **given, held_out=unseen(given), method=METHOD, training=training), work


def unseen(given):
    """Facts that no editor was trained on."""
    return facts_in(given["model"].path.parent / "unseen.jsonl", 10, 4)


def loss_of(given, data, editor=None):
    """The loss of facts, with an editor or with the one that training begins with."""
    model, tokenizer = (
        load(given["model"].path, torch.float32).requires_grad_(False),
        load_tokenizer(given["model"].path),
    )
    blocks = Blocks(model)
    torch.manual_seed(TRAINING.seed)
    network = METHOD.build(model, blocks) if editor is None else read_editor(editor, METHOD, model, blocks)
    if editor is None:
        METHOD.observe(network, model, blocks, [tokenized(row, tokenizer) for row in read_facts(given["data"])])
    rows = lessons_of({**given, "data": data}, tokenizer)
    with torch.no_grad():
        loss = EditedModel(network, model, blocks, METHOD)(on_device(rows, np.arange(len(rows)), torch.device("cpu")))
    return loss.item() / rows.loss_tokens


def lessons_of(given, tokenizer, training=TRAINING):
    return lessons(
        given["data"], packed_rows(given["locality"], tokenizer, replace(training, packing=False)), tokenizer, training
    )


def test_an_editor_learns_to_make_facts_likelier_and_leaves_other_texts_alone(given, made):
    editor, work = made
    assert type(editor) is Editor
    assert (editor.about["model"], editor.about["method"], editor.about["steps"]) == ("d" * 64, "mend", 30)
    assert loss_of(given, given["data"], editor) < 0.9 * loss_of(given, given["data"])
    others = unseen(given)
    learnt = loss_of(given, others, editor)
    assert learnt < 0.95 * loss_of(given, others), "it has learnt to edit, not only these facts"
    assert work.curve("held_out_loss") == [pytest.approx(learnt, rel=1e-4)]
    model, tokenizer = load(given["model"].path, torch.float32), load_tokenizer(given["model"].path)
    network = read_editor(editor, METHOD, model, Blocks(model))
    asked = [tokenized(row, tokenizer) for row in read_facts(given["data"])]
    texts = packed_rows(given["locality"], tokenizer, TRAINING)
    before, moved = said(model, asked), []
    after = []
    for fact in asked:
        delta = METHOD.solve(model, Blocks(model), [fact], statistics={}, editor=network)
        other = distribution(model, texts)
        with applied(model, delta):
            after += said(model, [fact])
            moved.append((other.exp() * (other - distribution(model, texts))).sum(-1).mean().item())
    assert np.mean(after) < np.mean(before) - 1
    assert np.mean(moved) < 0.3 * (np.mean(before) - np.mean(after))


@torch.no_grad()
def said(model, facts):
    found = []
    for fact in facts:
        ids = torch.cat([fact.prompts[0].ids, fact.target])[None]
        logits = model(input_ids=ids).logits[0, -len(fact.target) - 1 : -1]
        found.append(torch.nn.functional.cross_entropy(logits, fact.target).item())
    return found


@torch.no_grad()
def distribution(model, rows):
    batch = on_device(rows, np.arange(len(rows)), torch.device("cpu"))
    return model(input_ids=batch.ids).logits[batch.targets != IGNORED].log_softmax(-1)


def test_what_is_saved_edits_as_what_was_trained(given, made, tmp_path):
    editor, _ = made
    noted = json.loads((editor.path / "editor.json").read_text())
    assert noted["model"] == given["model"].digest
    assert (noted["method"], noted["fields"]["rank"], noted["fields"]["convention"]) == ("mend", 16, "paper")
    assert noted["changes"][0] == "model.layers.0.mlp.gate_proj.weight"
    assert len(noted["changes"]) == 6
    deltas = []
    for number in range(2):
        work = small.Work(tmp_path / str(number))
        delta = edit.body(work, model=given["model"], facts=given["data"], editor=editor, method=METHOD)
        deltas.append(load_delta(delta.path))
        assert delta.about["loss_after"] < delta.about["loss_before"]
        assert delta.about["contexts"] == 0
    model, tokenizer = load(given["model"].path, torch.float32), load_tokenizer(given["model"].path)
    asked = [tokenized(row, tokenizer) for row in read_facts(given["data"])]
    network = read_editor(editor, METHOD, model, Blocks(model))
    here = METHOD.solve(model, Blocks(model), asked, statistics={}, editor=network)
    assert here.keys() == deltas[0].keys() == set(noted["changes"])
    for name, change in here.items():
        assert torch.equal(deltas[0][name].left, deltas[1][name].left)
        torch.testing.assert_close(change.whole(), deltas[0][name].whole())


def test_training_goes_on_from_a_checkpoint_to_the_same_editor(given, made, tmp_path):
    settings = replace(TRAINING, max_steps=6, checkpoint_every=4)
    work = small.Work(tmp_path / "whole")
    whole = train_editor.body(work, **given, held_out=None, method=METHOD, training=settings)
    resumed = small.Work(tmp_path / "resumed")
    resumed.checkpoints += work.checkpoints
    again = train_editor.body(resumed, **given, held_out=None, method=METHOD, training=settings)
    assert resumed.curve() == work.curve()[4:]
    one, other = (load_file(e.path / "editor.safetensors") for e in (whole, again))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_it_has_observed_the_facts_that_it_was_trained_on_each_once(given, made):
    model, tokenizer = load(given["model"].path, torch.float32), load_tokenizer(given["model"].path)
    network = read_editor(made[0], METHOD, model, Blocks(model))
    seen = [factors(model, network.names, tokenized(row, tokenizer)) for row in read_facts(given["data"])]
    for key, shared in network.networks.items():
        z = [torch.cat(f[n], -1) for f in seen for n in network.names if network.network(n) is shared]
        assert shared.count == sum(map(len, z)), key
        torch.testing.assert_close(shared.total.float(), torch.cat(z).sum(0), rtol=1e-4, atol=1e-5)


def test_a_row_is_a_fact_with_one_of_its_paraphrases(given):
    tokenizer = load_tokenizer(given["model"].path)
    rows, facts = lessons_of(given, tokenizer), read_facts(given["data"])
    asked = [(i, p) for i, f in enumerate(facts) for p in (f.paraphrases or (f.prompt,))]
    assert len(rows) == len(asked) == 54
    batch = on_device(rows, np.arange(len(rows)), torch.device("cpu"))
    for at, (number, prompt) in enumerate(asked):
        lesson = rows.lesson(batch, at)
        ids, answer = spoken(prompt, facts[number].target, tokenizer)
        assert lesson.asked.tolist() == ids
        assert lesson.answer.tolist() == answer
        assert lesson.fact is rows.facts[number]
        assert lesson.fact.prompts[0].ids.tolist() == spoken(facts[number].prompt, facts[number].target, tokenizer)[0]
        text = rows.others.ids[at % len(rows.others)]
        assert lesson.others[0].tolist() == text[: lesson.others.shape[1]].tolist()
        assert lesson.kept.sum() == (rows.others.targets[at % len(rows.others)] != IGNORED).sum()


def test_each_batch_has_the_next_texts_beside_it(given):
    rows = lessons_of(given, load_tokenizer(given["model"].path))
    beside = NextTexts(rows, TRAINING)
    seen = []
    for step in range(3):
        where = np.arange(4 * step, 4 * step + 4)
        got, same = beside(step, where)
        assert same is where
        seen += got.beside[where].tolist()
    assert sorted(seen) == list(range(12)), "one epoch of twelve texts in three steps of four"
    assert seen == [
        beside(s, np.arange(4 * s, 4 * s + 4))[0].beside[i] for s in range(3) for i in range(4 * s, 4 * s + 4)
    ]


def test_a_fact_that_is_longer_than_a_row_is_refused(given, tmp_path):
    long = Dataset(str(tmp_path / "long.jsonl"))
    row = {"subject": "cat", "prompt": "and " * 9 + "cat", "target": "sat"}
    Path(long.uri).write_text(json.dumps(row))
    with pytest.raises(DatasetError, match=r"with its answer has \d+ tokens, expected at most length=8"):
        lessons_of({**given, "data": long}, load_tokenizer(given["model"].path), replace(TRAINING, length=8))


def test_everything_that_headers_tell_of_training_is_said_at_once(given, tmp_path):
    def told(**changes):
        known = {**given, "held_out": None, "method": METHOD, "training": TRAINING, "resources": Resources(), **changes}
        return list(train_editor.problems(**known))

    assert told() == []
    assert told(model=None, data=None, locality=None, resources=Resources(workers=2, strategy="ddp")) == []
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "num_layers": 1}))
    bert, texts = Model(str(tmp_path / "bert"), "e" * 64), given["locality"]
    training = replace(TRAINING, max_steps=0, gradient_checkpointing=True, length=128)
    assert told(
        model=bert, data=texts, locality=given["data"], training=training, resources=Resources(strategy="zero2")
    )[:4] == [
        "MEND: strategy='zero2', expected one of single, ddp. It cannot share a model that way.",
        "MEND: 'encoder' under model, expected 'decoder'. Give another, or choose another method.",
        "MEND: num_blocks=2, expected at most 1, the model's layers.",
        f"locality: {given['data'].uri}: has the columns 'subject', 'prompt', 'target', 'paraphrases', expected "
        "'messages', or 'prompt' and 'completion', or 'instruction' and 'output', or 'text' alone or with "
        "'label', or 'image' and 'label'. Rename the columns.",
    ]
    (clause,) = told(held_out=texts)
    assert clause.startswith(f"held_out: {texts.uri} has the columns text, expected 'subject', 'prompt', 'target'.")
    assert [c.partition(",")[0] for c in told(training=replace(training, length=32))] == [
        "max_steps=0",
        "gradient_checkpointing=True",
    ]
    (clause,) = told(method=ROME())
    assert clause.startswith("method: ROME edits without a trained network, expected one that trains an editor.")


def test_an_editor_that_does_not_fit_is_refused_by_name(given, made, tmp_path):
    editor, _ = made

    def told(**changes):
        known = {"model": given["model"], "facts": given["data"], "statistics": None, "editor": editor, **changes}
        kinds = {name: () for name, artifact in known.items() if artifact is not None}
        return list(edit.problems(**{"method": METHOD, **known}, kinds=kinds, resources=None))

    assert told() == []
    (clause,) = told(editor=None)
    assert clause.startswith("editor: none is given, expected one that was trained for the model.")
    (clause,) = told(model=replace(given["model"], digest="e" * 64))
    assert clause == (
        "editor: made for the model of digest dddddddddddd, expected the one that edit is given, eeeeeeeeeeee. "
        "Train one for this model."
    )
    assert told(method=replace(METHOD, rank=8, convention="released")) == [
        "editor: trained with rank=16, expected the method's 8. Write rank: 16, or train it so.",
        "editor: trained with convention='paper', expected the method's 'released'. "
        'Write convention: "paper", or train it so.',
    ]
    other = tmp_path / "other"
    other.mkdir()
    (clause,) = told(editor=Editor(str(other)))
    assert "editor.json" in clause
    noted = json.loads((editor.path / "editor.json").read_text())
    (other / "editor.json").write_text(json.dumps({**noted, "method": "ke"}))
    (clause,) = told(editor=Editor(str(other)))
    assert clause.startswith("editor: one of the method 'ke', expected 'mend'.")
    with pytest.raises(EditingError, match="editor: one of the method 'ke'"):
        edit.body(
            small.Work(tmp_path / "work"),
            model=given["model"],
            facts=given["data"],
            editor=Editor(str(other)),
            method=METHOD,
        )


def test_a_damaged_editor_is_refused(given, made, tmp_path):
    whole = load_file(made[0].path / "editor.safetensors")
    model = load(given["model"].path, torch.float32)
    for name, wanted in (("rates", "no 'rates'"), ("networks.16x24.count", r"'networks.16x24.count' of shape \(3,\)")):
        folder = tmp_path / name
        folder.mkdir()
        changed = {n: v for n, v in whole.items() if n != name} | ({} if name == "rates" else {name: torch.zeros(3)})
        save_file(changed, folder / "editor.safetensors")
        with pytest.raises(DamagedEditor, match=wanted) as raised:
            read_editor(Editor(str(folder)), METHOD, model, Blocks(model))
        assert str(DamagedEditor(*raised.value.args)) == str(raised.value)


PIPELINE = """
name: taught
inputs:
  base: {model: FOLDER/model}
  facts: {dataset: FOLDER/facts.jsonl}
  texts: {dataset: FOLDER/texts.jsonl}
steps:
  editor:
    operator: train_editor
    inputs: {model: base, data: facts, locality: texts}
    method: METHOD
    params: TRAINING
    resources: {workers: 2, strategy: ddp}
  change:
    operator: edit
    inputs: {model: base, facts: facts, editor: editor}
    method: METHOD
  edited: {operator: apply, inputs: {model: base, delta: change}}
"""


@pytest.mark.ray
@pytest.mark.slow
def test_an_editor_that_workers_train_together_is_that_of_one_process(given, store, ray_local, tmp_path):
    """Also: a pipeline trains an editor, edits with it and applies the change."""
    # Five rows a batch: of two workers that hold one at once, the second has nothing to do in the end.
    settings = {"max_steps": 6, "batch_size": 5, "length": 32, "learning_rate": 1e-2, "seed": 1}
    fields = {"name": "mend", **METHOD.hyperparameters()}
    text = PIPELINE.replace("FOLDER", str(given["model"].path.parent)).replace("METHOD", json.dumps(fields))
    text = text.replace("TRAINING", json.dumps({**settings, "micro_batch_size": 1}))
    catalog = Catalog()
    planned = plan(
        parsed(Text(text, "taught.yaml"), catalog=catalog).whole(), Looks(tmp_path / "inputs.sqlite", store), catalog
    )
    assert run(planned, store, Journal.claim(store.storage, "one"), connect=ray_local) == "done"
    found = {n: store.get(s.data["digest"]) for n, s in states(history(store.storage, "one"), planned.steps).items()}

    work = small.Work(tmp_path / "work")
    model = replace(given["model"], digest=found["change"].about["base"])
    alone = train_editor.body(
        work, **{**given, "model": model}, held_out=None, method=METHOD, training=Training(**settings)
    )
    assert (found["editor"].path / "editor.json").read_bytes() == (alone.path / "editor.json").read_bytes()
    got, wanted = (load_file(e.path / "editor.safetensors") for e in (found["editor"], alone))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)
    lines = store.storage.read("runs/one/measures/editor/1.jsonl").decode().splitlines()
    told = [m["loss"] for m in (json.loads(line).get("measures", {}) for line in lines) if "loss" in m]
    assert told == pytest.approx(work.curve(), rel=1e-4)

    change, edited = load_delta(found["change"].path), load(found["edited"].path).state_dict()
    before = load(model.path).state_dict()
    for name, tensor in edited.items():
        moved = change[name].whole() if name in change else 0.0
        torch.testing.assert_close(tensor, before[name] + moved)
