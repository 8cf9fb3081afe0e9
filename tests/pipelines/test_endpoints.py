"""What a Ray Serve config deploys is what the store holds."""

import socket

import openai
import pytest

from cluster.manifests.job import Served
from cluster.manifests.serve import serve_config
from operators.artifact import Model
from operators.serving import ProbeFailed
from pipelines.plan import InputProblem
from tests.operators.small import saved

pytestmark = pytest.mark.ray


@pytest.fixture
def stored(store, tmp_path):
    """Two models of a store, by how a config names them."""

    def put(name, **changes):
        return f"lfm://{store.put(saved(tmp_path / name, **changes).path, 'model', {})}"

    return store, put("model"), put("base", seed=1)


def test_a_config_brings_up_the_model_that_it_names(stored, ray_local):
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    store, model, base = stored
    ray_local()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    endpoint = Served(name="tiny", inputs={"model": model, "base": base}, port=port, cpus=0.5)
    config = serve_config(endpoint, store=store.storage.uri, environment={})
    serve.start(http_options=config["http_options"], proxy_location="HeadOnly")
    try:
        _get_global_client().deploy_apps(ServeDeploySchema(**config))
        _get_global_client()._wait_for_application_running("tiny", timeout_s=300)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        (listed,) = client.models.list().data
        assert (listed.id, listed.digest) == ("tiny", model.removeprefix("lfm://"))
        assert client.completions.create(model="tiny", prompt="the cat", max_tokens=2).choices[0].text
    finally:
        serve.shutdown()


def test_a_replica_that_says_what_the_base_says_does_not_come_up(stored):
    from pipelines.endpoints import Stored

    store, name, base = stored
    model, same, other = (Model(uri, digest=uri.removeprefix("lfm://")) for uri in (name, name, base))
    up = Stored(store.storage.uri, "tiny", {"model": model, "base": other})
    assert up.identity() == {"digest": model.digest}
    with pytest.raises(ProbeFailed, match="are the base's too"):
        Stored(store.storage.uri, "tiny", {"model": model, "base": same})


def test_arguments_that_no_endpoint_takes_are_refused_by_name(stored):
    from pipelines.endpoints import UnknownArgument, application

    store, model, _ = stored
    whole = {"store": store.storage.uri, "name": "tiny", "model": model}
    with pytest.raises(UnknownArgument, match="argument 'models', expected store, name and model"):
        application({**whole, "models": model})
    with pytest.raises(UnknownArgument, match="argument 'store'"):
        application({"name": "tiny", "model": model})
    with pytest.raises(InputProblem, match="is not in the store"):
        application({**whole, "model": "lfm://" + "0" * 64})
