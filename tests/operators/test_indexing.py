"""A datastore beside a model: made by any number of workers, read by another process, used where the model answers."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lfm.errors import HyperparameterError
from lfm.retrieval import _search
from lfm.retrieval.knn_lm import KNNLM
from lfm.weights import Weights
from operators.artifact import Adapter, Dataset, Datastore, Memory, Model
from operators.data.batches import Document, NoLossToken, documents
from operators.data.rows import read_rows
from operators.engines.consulting import engine_of
from operators.engines.native import Sampling
from operators.evaluation import evaluate
from operators.indexing import Indexer, NotFiniteKey, index, windows
from operators.models.belonging import OtherModel
from operators.models.datastore_files import DatastoreError, opened
from operators.models.language_models import load, load_tokenizer
from operators.resources import Resources
from operators.serving import serve
from pipelines.inputs.inspector import Looks
from pipelines.inputs.model_files import lacking, needed
from pipelines.lineage import Journal, history, states as states_of
from pipelines.plan import plan
from pipelines.run import run
from pipelines.spec import load as load_spec
from tests.operators import small

pytestmark = pytest.mark.slow

METHOD = KNNLM(k=4, share=0.4, temperature=2.0)
ASKED = {"length": 16, "batch_size": 5, "precision": "float32"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a corpus, and a datastore of both."""
    root = tmp_path_factory.mktemp("datastore")
    model, texts = small.saved(root / "model", seed=3), small.texts(root / "texts.jsonl")
    work = small.Work(root / "work")
    datastore = index.body(work, model=model, data=texts, method=METHOD, **ASKED)
    return model, texts, datastore, work


def tokens_of(texts, model):
    return [d.ids for d in documents(read_rows(texts).to_pydict(), load_tokenizer(model.path))]


def stored(datastore):
    weights = Weights(datastore.path, "datastore")
    return weights.read("keys").float(), weights.read("values")


@torch.no_grad()
def states(whole, ids):
    """What enters the last layer's MLP at each token, and the model's log-probabilities, of one text alone."""
    seen = []
    norm = whole.model.layers[-1].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    said = whole(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(dim=-1)
    handle.remove()
    return seen[0], said


def mixed(keys, values, query, said):
    """The method's distribution, entry by entry."""
    distances = [(float((key - query).square().sum()), int(value)) for key, value in zip(keys, values, strict=True)]
    near = sorted(distances)[: METHOD.k]
    weights = [math.exp(-d / METHOD.temperature) for d, _ in near]
    told = [(1 - METHOD.share) * math.exp(x) for x in said.tolist()]
    for weight, (_, token) in zip(weights, near, strict=True):
        told[token] += METHOD.share * weight / sum(weights)
    return told


def cut(ids, length):
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def test_entries_are_each_text_s_states_with_what_followed(made):
    model, texts, datastore, _ = made
    keys, values = stored(datastore)
    whole = load(model.path)
    wanted = [
        (state, token)
        for ids in tokens_of(texts, model)
        for piece in cut(ids, 16)
        for state, token in zip(states(whole, piece)[0][:-1], piece[1:], strict=True)
    ]
    assert values.tolist() == [token for _, token in wanted]
    assert values.dtype == torch.int32
    torch.testing.assert_close(keys, torch.stack([state for state, _ in wanted]), atol=1e-5, rtol=1e-4)
    noted = json.loads((datastore.path / "datastore.json").read_text())
    assert noted["model"] == model.digest
    assert (noted["entries"], noted["width"], noted["precision"]) == (len(values), 16, "float32")
    assert noted["method"] == {"name": "knn_lm", **METHOD.hyperparameters()}
    assert datastore.about == {**noted, "documents": 12}


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (8, 1), (64, 5), (5, 4)])
@pytest.mark.parametrize("number", [1, 2, 8, 9, 23])
def test_windows_tell_each_token_once_with_what_came_before(length, stride, number):
    learnt = [i % 3 != 1 for i in range(number)]
    told = {}
    for window in windows(Document(list(range(number)), learnt), length, stride):
        assert len(window.ids) <= length
        for place in range(1, len(window.ids)):
            if window.answer[place]:
                assert told.setdefault(window.ids[place], place) == place
                assert list(window.ids[:place]) == list(range(window.ids[place] - place, window.ids[place]))
    lost = range(0, number, length) if stride == length else (0,)
    assert sorted(told) == [i for i in range(number) if learnt[i] and i not in lost]
    assert all(place >= min(token, length - stride) for token, place in told.items())


def test_windows_that_overlap_and_a_limit(made):
    model, _, _, work = made
    (long,) = tokens_of(small.texts(work.folder / "one.jsonl", 1), model)
    text = load_tokenizer(model.path).decode(long * 4)
    path = work.folder / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for _ in range(3)))
    given = {"model": model, "data": Dataset(str(path)), "method": METHOD, **ASKED, "length": 8}
    ids = tokens_of(given["data"], model)[0]
    keys, values = stored(index.body(work.another(), **given, stride=3))
    assert values.tolist() == ids[1:] * 3
    last = next(start for start in range(0, len(ids), 3) if start + 8 >= len(ids))
    wanted = states(load(model.path), ids[last:])[0][-2]
    torch.testing.assert_close(keys[len(ids) - 2], wanted, atol=1e-5, rtol=1e-4)
    some = index.body(work.another(), **given, stride=3, max_tokens=len(ids) + 3)
    assert some.about["documents"] == 2
    assert torch.equal(stored(some)[0], keys[: len(ids) + 3])


def test_an_evaluation_mixes_what_followed_in_similar_places(made, tmp_path):
    model, _, datastore, work = made
    data = small.texts(tmp_path / "held_out.jsonl", 5)
    keys, values = stored(datastore)
    whole = load(model.path)
    losses = []
    for ids in tokens_of(data, model):
        queries, said = states(whole, ids)
        each = [mixed(keys, values, q, x)[t] for q, x, t in zip(queries[:-1], said[:-1], ids[1:], strict=True)]
        losses.append(-sum(map(math.log, each)))
    given = {"model": model, "data": {"text": data}, "length": 32, "batch_size": 2}
    result = evaluate.body(work.another(), **given, datastore=datastore)
    found = pq.read_table(result.path / "documents.parquet")["loss"].to_pylist()
    assert found == pytest.approx(losses, rel=1e-4)
    alone = index.body(
        work.another(), model=model, data=data, method=replace(METHOD, share=0.0), **{**ASKED, "length": 32}
    )
    unmixed = evaluate.body(work.another(), **given, datastore=alone).about["sets"]
    assert unmixed["text"]["loss"] == pytest.approx(
        evaluate.body(work.another(), **given).about["sets"]["text"]["loss"]
    )


def test_facts_are_asked_of_the_mixture_and_compared_with_the_model_alone(made, tmp_path):
    model, _, _, work = made
    facts = tmp_path / "facts.jsonl"
    neighbour = {"prompt": "it ran", "answer": "while"}
    row = {"subject": "dog", "prompt": "the dog ran", "target": "over", "true": "to", "neighbours": [neighbour]}
    facts.write_text(json.dumps(row))
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "the dog ran over"}))
    corpus = Dataset(str(tmp_path / "corpus.jsonl"))
    datastore = index.body(work.another(), model=model, data=corpus, method=KNNLM(k=1, share=0.9), length=16)
    given = {"model": model, "data": {"facts": Dataset(str(facts))}, "length": 32}
    found = evaluate.body(work.another(), **given, datastore=datastore).about["sets"]["facts"]
    assert (found["efficacy"], found["efficacy_exact"], found["efficacy_success"]) == (1.0, 1.0, 1.0)
    assert found["efficacy_magnitude"] == pytest.approx(0.9, abs=0.05)
    assert found["divergence"] > 0.1
    assert evaluate.body(work.another(), **given).about["sets"]["facts"]["efficacy"] == 0.0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("key", ["mlp", "output"])
def test_answers_are_those_of_the_whole_text_mixed_again_at_every_token(kind, key, tmp_path, made):
    _, texts, _, _ = made
    model = small.saved(tmp_path / "model", kind, seed=3)
    work = small.Work(tmp_path / "work")
    datastore = index.body(work, model=model, data=texts, method=replace(METHOD, key=key, share=0.9), **ASKED)
    engine, alone = engine_of(model, None, datastore), engine_of(model)
    engine.ends = alone.ends = set()
    prompts = [[40, 41, 42], [50], [60, 61, 62, 63, 64]]
    wanted = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(engine.logits(ids)[-1].argmax()))
        wanted.append(ids[len(prompt) :])
    sampling = Sampling(max_tokens=6)
    assert [engine.complete([p], sampling)[0] for p in prompts] == wanted
    assert engine.complete(prompts, sampling) == wanted
    assert alone.complete(prompts, sampling) != wanted
    torch.testing.assert_close(engine.logits(prompts[2]).exp().sum(dim=1), torch.ones(5))


def test_draws_come_from_the_mixture(made):
    model, _, datastore, _ = made
    engine = engine_of(model, None, datastore)
    engine.ends = set()
    shares = engine.logits([40, 41])[-1].exp()
    drawn = engine.complete([[40, 41]] * 4000, Sampling(max_tokens=1, temperature=1.0))
    seen = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(shares)) / 4000
    likely = shares > 0.02
    assert likely.any()
    assert ((seen - shares).abs() < 4 * (shares * (1 - shares) / 4000).sqrt())[likely].all()


def test_another_process_reads_the_same_datastore(made):
    model, _, datastore, _ = made
    code = (
        "import json, sys; from operators.artifact import Datastore, Model; "
        "from operators.engines.consulting import engine_of; "
        "engine = engine_of(Model(sys.argv[1], sys.argv[2]), None, Datastore(sys.argv[3])); "
        "print(json.dumps(engine.logits([40, 41, 42]).tolist()))"
    )
    told = [sys.executable, "-c", code, model.uri, model.digest, datastore.uri]
    done = subprocess.run(told, capture_output=True, text=True, check=True)
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert torch.equal(found, engine_of(model, None, datastore).logits([40, 41, 42]))


PIPELINE = """
name: retrieved
inputs:
  model: {model: MODEL}
  corpus: {dataset: DATA}
steps:
  datastore:
    operator: index
    inputs: {model: model, data: corpus}
    method: {name: knn_lm, k: 4, share: 0.4, temperature: 2.0}
    params: {length: 16, batch_size: 5, precision: float32}
    resources: {workers: 2}
  mixed:
    operator: evaluate
    inputs: {model: model, datastore: datastore, data: {text: corpus}}
    params: {length: 32}
"""


@pytest.mark.ray
def test_a_run_shares_the_corpus_among_workers_and_mixes_what_they_found(store, ray_local, made):
    model, texts, datastore, work = made
    spec = load_spec(PIPELINE.replace("MODEL", model.uri).replace("DATA", texts.uri), source="retrieved.yaml")
    planned = plan(spec, Looks(Path(store.storage.uri) / "inputs.sqlite", store))
    assert run(planned, store, Journal.claim(store.storage, "one"), connect=ray_local) == "done"
    steps = states_of(history(store.storage, "one"), planned.steps)
    two = store.get(steps["datastore"].data["digest"])
    name = "datastore.safetensors"
    assert (two.path / name).read_bytes() == (datastore.path / name).read_bytes()
    mixed = steps["mixed"].data["about"]["sets"]["text"]["perplexity"]
    given = {"model": model, "data": {"text": texts}, "length": 32}
    with_it, without = (evaluate.body(work.another(), **given, datastore=d) for d in (datastore, None))
    assert mixed == pytest.approx(with_it.about["sets"]["text"]["perplexity"])
    assert mixed < without.about["sets"]["text"]["perplexity"] / 10


def test_an_index_of_faiss_is_read_only_where_it_is_the_one_that_was_made(made):
    pytest.importorskip("faiss")
    model, texts, datastore, work = made
    method = replace(METHOD, search="flat")
    flat, again = (index.body(work.another(), model=model, data=texts, method=method, **ASKED) for _ in range(2))
    for name in ("index.faiss", "datastore.json"):
        assert (flat.path / name).read_bytes() == (again.path / name).read_bytes()
    exact = engine_of(model, None, datastore).logits([40, 41, 42])
    torch.testing.assert_close(engine_of(model, None, flat).logits([40, 41, 42]), exact)
    names = ["datastore.safetensors", "datastore.json", "index.faiss"]
    assert lacking(Datastore, names) is None
    assert needed(Datastore, names) == names
    with (flat.path / "index.faiss").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(DatastoreError, match=r"its index.faiss is not the one that datastore.json names, expected a"):
        opened(flat)


def test_a_datastore_stays_beside_its_own_model(made, tmp_path):
    model, texts, datastore, work = made
    other = replace(model, digest="o" * 64)
    adapter = Adapter(str(tmp_path), about={"base": model.digest})
    memory = Memory(str(tmp_path), about={"model": model.digest})
    given = {"data": {"text": texts}, "length": 32, "datastore": datastore}
    said = r"datastore: made for the model of digest dddddddddddd, expected the one that \w+ is given, oooooooooooo\."
    for call in (
        lambda: engine_of(other, None, datastore),
        lambda: evaluate.body(work.another(), model=other, **given),
    ):
        with pytest.raises(OtherModel, match=said):
            call()
    with pytest.raises(DatastoreError, match=r"it is given with 'adapter', expected the model that it was made for"):
        evaluate.body(work.another(), model=adapter, base=model, **given)
    for call in (
        lambda: engine_of(model, memory, datastore),
        lambda: evaluate.body(work.another(), model=model, memory=memory, **given),
    ):
        with pytest.raises(DatastoreError, match=r"a memory and a datastore are given, .* expected one of them\."):
            call()
    for noted, what in (
        ({"model": model.digest}, "does not say how it is read"),
        ({"model": model.digest, "method": {"name": "knn_lm"}}, "its keys are not those of datastore.json"),
    ):
        folder = tmp_path / what.replace(" ", "-")
        folder.mkdir()
        (folder / "datastore.safetensors").write_bytes((datastore.path / "datastore.safetensors").read_bytes())
        (folder / "datastore.json").write_text(json.dumps(noted))
        with pytest.raises(DatastoreError, match=what) as caught:
            opened(Datastore(str(folder)))
        assert str(DatastoreError(*caught.value.args)) == str(caught.value)


def test_a_plan_hears_of_everything_at_once(made, tmp_path, monkeypatch):
    model, texts, datastore, _ = made
    other, texts_of = replace(model, digest="o" * 64), {"text": texts}
    asked = {"resources": Resources(), "kinds": {}}
    assert list(index.problems(model=model, data=texts, method=METHOD, length=32, **asked)) == []
    assert list(index.problems(model=None, data=None, method=METHOD, **asked)) == []
    found = index.problems(
        model=model, data=small.labelled(tmp_path / "labelled.jsonl"), method=KNNLM(layer=7), length=80, stride=81,
        max_tokens=0, batch_size=0, **asked,
    )  # fmt: skip
    for sentence, start in zip(
        found,
        (
            "index: stride=81, expected 1 <= stride <= length",
            "index: max_tokens=0",
            "index: batch_size=0",
            "length=80, expected at most the 64 tokens",
            "data: ",
            "KNNLM: layer=7, expected layer < 2",
        ),
        strict=True,
    ):
        assert sentence.startswith(start)
    kinds = {"model": (Model,), "datastore": (Datastore,)}
    told = {"base": None, "datastore": datastore, "data": texts_of, "length": 32, "resources": Resources()}
    assert list(evaluate.problems(model=model, kinds=kinds, **told)) == []
    (said,) = evaluate.problems(model=other, kinds=kinds, **told)
    assert said.startswith("datastore: made for the model of digest dddddddddddd")
    (said,) = evaluate.problems(model=None, kinds={**kinds, "model": (Adapter,), "base": (Model,)}, **told)
    assert "it is given with 'adapter'" in said
    (said,) = evaluate.problems(model=model, kinds={**kinds, "memory": (Memory,)}, **told)
    assert said.startswith("evaluate: a memory and a datastore are given")
    classifier = small.classifier(tmp_path / "classifier")
    labelled = {"labels": small.labelled(tmp_path / "rows.jsonl")}
    said = list(evaluate.problems(model=classifier, kinds=kinds, **{**told, "datastore": None, "data": labelled}))
    assert said == ["datastore: given with a classifier, expected a decoder, which tells tokens. Leave it out."]
    address = {"name": "tiny", "port": 8000, "resources": Resources()}
    (said,) = serve.problems(model=other, datastore=datastore, kinds=kinds, **address)
    assert "expected the one that serve is given, oooooooooooo" in said
    (said,) = serve.problems(model=model, datastore=datastore, kinds={**kinds, "memory": (Memory,)}, **address)
    assert said.startswith("serve: a memory and a datastore are given")
    monkeypatch.setattr(_search, "find_spec", lambda name: None)
    (said,) = index.problems(model=None, data=None, method=KNNLM(search="flat"), **asked)
    assert "FAISS is not installed" in said


def test_what_cannot_be_stored_is_refused(made, tmp_path):
    model, texts, _, work = made
    with pytest.raises(HyperparameterError, match="index: stride=17, expected 1 <= stride <= length"):
        index.body(work.another(), model=model, data=texts, method=METHOD, **ASKED, stride=17)
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": ""}))  # all of it is the token that ends a text
    with pytest.raises(NoLossToken, match="none of 1 rows"):
        index.body(work.another(), model=model, data=Dataset(str(tmp_path / "short.jsonl")), method=METHOD, **ASKED)
    large = load(model.path)
    with torch.no_grad():
        large.model.layers[-1].post_attention_layernorm.weight.mul_(1e6)
    large.save_pretrained(tmp_path / "large")
    load_tokenizer(model.path).save_pretrained(tmp_path / "large")
    arguments = {"model": tmp_path / "large", "data": texts, "method": METHOD, "length": 16, "stride": 16}
    worker = Indexer(torch.device("cpu"), **arguments, rows=12, batch_size=5, precision="float16")
    with pytest.raises(NotFiniteKey, match="keys of the documents from 6 on: infinite") as caught:
        worker.part(1)
    assert str(NotFiniteKey(*caught.value.args)) == str(caught.value)


def test_keys_of_two_bytes_are_the_rounded_ones(made):
    model, texts, datastore, work = made
    half = index.body(work.another(), model=model, data=texts, method=METHOD, **{**ASKED, "precision": "float16"})
    keys, values = stored(half)
    assert Weights(half.path, "datastore").headers["keys"].dtype == torch.float16
    assert torch.equal(keys, stored(datastore)[0].half().float())
    assert torch.equal(values, stored(datastore)[1])
    assert isinstance(opened(half)[1].keys, np.memmap)
