"""A model behind an endpoint: that it is the right one, and that nothing of it stays."""

import json
import socket
import urllib.request
from dataclasses import replace

import openai
import pytest
import torch

from lfm.memory.grace import GRACE
from lfm.retrieval.knn_lm import KNNLM
from operators.artifact import Dataset, Deployment, Memory, Model
from operators.engines.consulting import engine_of
from operators.engines.ports import PortBusy, check_port
from operators.indexing import index
from operators.memories import remember
from operators.resources import Resources
from operators.serving import EndpointTaken, ProbeFailed, _prove, _prove_memory, probe_ids, serve, take_down
from tests.operators.small import saved

pytestmark = pytest.mark.ray


@pytest.fixture
def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def served(ray_local, tmp_path, workspace, port):
    """A tiny model, its endpoint, and the model that it must differ from."""
    from ray import serve as ray_serve

    ray_local()
    model, base = saved(tmp_path / "model"), saved(tmp_path / "base", seed=1)
    yield model, base, serve.body(workspace, model=model, base=base, name="tiny", port=port)
    ray_serve.shutdown()


def test_an_endpoint_proves_its_model_answers_openai_and_goes(served, workspace, tmp_path, port):
    model, base, made = served
    assert isinstance(made, Deployment)
    assert made.about["probe"]["from_artifact"] < 1e-4 < made.about["probe"]["from_base"]
    assert json.loads(made.path.read_text()) == made.about

    client = openai.OpenAI(base_url=made.about["url"], api_key="none", max_retries=0)
    (listed,) = client.models.list().data
    assert (listed.id, listed.digest) == ("tiny", model.digest)
    wish = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**wish)
    parts = client.chat.completions.create(**wish, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="no model is called 'other'"):
        client.completions.create(model="other", prompt="the cat")

    # The same name again is the same endpoint with another model; a second name has no place.
    again = serve.body(workspace.another(), model=base, name="tiny", port=port)
    assert again.about["model"] == base.digest
    with pytest.raises(EndpointTaken, match="serves 'tiny' below /v1 already"):
        serve.body(workspace.another(), model=model, name="second", port=port)

    with pytest.raises(ProbeFailed, match="are the base's too"):
        serve.body(workspace.another(), model=model, base=model, name="tiny", port=port)
    with pytest.raises(urllib.error.HTTPError):  # what failed its probe is not left up
        urllib.request.urlopen(f"{made.about['url']}/models", timeout=30)
    take_down("tiny", model.digest)


def test_an_endpoint_consults_the_memory_or_the_datastore_of_its_model(ray_local, tmp_path, workspace, port):
    from ray import serve as ray_serve

    ray_local()
    model, facts = saved(tmp_path / "model", seed=3), tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"subject": "dog", "prompt": "the dog ran", "target": "over"}))
    method = GRACE(radius=1e-3, steps=20)
    made = remember.body(workspace.another(), model=model, facts=Dataset(str(facts)), method=method)
    memory = replace(made, digest="m" * 64)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "the dog ran over it"}))
    store = {"data": Dataset(str(corpus)), "method": KNNLM(k=1, share=0.99), "length": 32}
    datastore = replace(index.body(workspace.another(), model=model, **store), digest="k" * 64)
    try:
        live = serve.body(workspace, model=model, memory=memory, name="tiny", port=port)
        proof = live.about["probe"]
        assert max(proof["from_artifact"], proof["from_memory"]) < 1e-4 < proof["from_model_alone"]
        assert (live.about["model"], live.about["memory"]) == (model.digest, memory.digest)
        client = openai.OpenAI(base_url=live.about["url"], api_key="none", max_retries=0)
        (listed,) = client.models.list().data
        assert (listed.digest, listed.memory) == (model.digest, memory.digest)
        answer = client.completions.create(model="tiny", prompt="the dog ran", temperature=0, max_tokens=1)
        assert answer.choices[0].text.strip() == "over"

        live = serve.body(workspace.another(), model=model, datastore=datastore, name="tiny", port=port)
        proof = live.about["probe"]
        assert proof["from_artifact"] < 1e-4 < proof["from_model_alone"]
        (listed,) = client.models.list().data
        assert (listed.digest, listed.datastore) == (model.digest, datastore.digest)
        assert "memory" not in live.about
        answer = client.completions.create(model="tiny", prompt="the dog", temperature=0, max_tokens=3)
        assert answer.choices[0].text.strip() == "ran over it"
    finally:
        ray_serve.shutdown()

    # A replica that answers without it is found out.
    with_it, alone = engine_of(model, memory), engine_of(model, None)
    assert _prove_memory("tiny", with_it.logits, with_it, model, memory)["from_memory"] == 0.0
    with pytest.raises(ProbeFailed, match="differ from the memory's by"):
        _prove_memory("tiny", alone.logits, with_it, model, memory)
    asked = {"name": "tiny", "port": port, "resources": Resources(), "kinds": {"model": (Model,), "memory": (Memory,)}}
    assert list(serve.problems(**asked, model=model, memory=memory)) == []
    (said,) = serve.problems(**asked, model=replace(model, digest="o" * 64), memory=memory)
    assert "it is kept beside dddddddddddd, expected model oooooooooooo" in said
    mixed, ids = engine_of(model, None, datastore), probe_ids(model.path)
    with pytest.raises(ProbeFailed, match="differ from the artifact's by"):
        _prove("tiny", lambda ids: alone.logits(ids).log_softmax(-1), mixed, model, None, ids)
    with pytest.raises(ProbeFailed, match="are the base's too"):
        _prove("tiny", mixed.logits, mixed, model, model, ids)


def test_a_port_that_somebody_listens_on_is_refused(ray_local, tmp_path, workspace):
    ray_local()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortBusy, match=f"127.0.0.1:{port} is in use, expected a free port"):
            serve.body(workspace, model=saved(tmp_path / "model"), port=port)
    check_port("endpoint", "127.0.0.1", port)


def test_logits_of_the_probe_are_the_models(tmp_path):
    from operators.engines.native import Native
    from operators.models.language_models import load, load_tokenizer

    folder = saved(tmp_path / "model").path
    ids = probe_ids(folder)
    assert len(set(ids)) == len(ids)
    model = load(folder)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Native(model, load_tokenizer(folder)).logits(ids), wanted)
