"""The Ray Serve deployment behind `serve`; imported only where one is brought up."""

from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray import serve

from operators.artifact import Datastore, Memory, Model
from operators.engines.consulting import engine_of
from operators.engines.openai_api import api


class Replica:
    """An engine, and the OpenAI API in front of it."""

    def __init__(
        self, model: Model, memory: Memory | None, datastore: Datastore | None, name: str, about: dict[str, Any]
    ) -> None:
        self.engine = engine_of(model, memory, datastore, device=given_device())
        self.name, self.about = name, about

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve asks for once the replica is there."""
        return api(self.engine, self.name, self.about)

    def identity(self) -> dict[str, Any]:
        """What `about` said it is."""
        return self.about

    def probe(self, ids: Sequence[int]) -> list[list[float]]:
        """The logits after each token, to be compared with the artifact's."""
        return self.engine.logits(ids).tolist()


def given_device() -> torch.device:
    """What this process computes on: the GPU, or the share of one, that Ray has given it, or else the CPU."""
    return torch.device("cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu")


Endpoint = serve.deployment(serve.ingress()(Replica), name="Endpoint")
"""One such replica, where what it answers with is at hand on its machine."""
