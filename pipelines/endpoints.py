"""Arguments of a Ray Serve config -> the application that serves what a store holds: what a RayService deploys.

Imported only by Ray Serve, which calls `application` by its name (`cluster.manifests.serve`).
"""

from collections.abc import Mapping
from typing import Any

from ray import serve

from lfm.errors import LfmError
from operators.artifact import Artifact, Datastore, Memory, Model
from operators.engines.consulting import engine_of
from operators.engines.endpoint import Replica
from operators.serving import check_differs, probe_ids
from pipelines.execute import fetched, memory_of
from pipelines.inputs.inspector import Looks
from pipelines.storage.opening import open_storage
from pipelines.store import Store

PARTS: dict[str, type[Artifact]] = {"model": Model, "base": Model, "memory": Memory, "datastore": Datastore}
"""What an endpoint is made of, by the names of the inputs of `serve`."""


class UnknownArgument(LfmError, ValueError):
    """An argument that no endpoint takes, or that one lacks."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"endpoint: argument {self.name!r}, expected store, name and model, and base, memory or datastore where it "
            "has some. Render its config anew."
        )


def application(args: Mapping[str, str]) -> Any:
    """The application of one endpoint.

    Args:
        args: ``store``, the ``name`` that requests call it, and where each of its parts is (``lfm://RUN/STEP``).

    Raises:
        UnknownArgument: There is another one, or one of these is missing.
        InputProblem: A part is not there yet, or is something else.
    """
    needed = {"store", "name", "model"}
    for name in sorted(({*args} - {*needed, *PARTS}) | (needed - {*args})):
        raise UnknownArgument(name)
    store = Store(open_storage(args["store"]))
    looks = Looks(memory_of(store.storage), store)
    parts = {name: looks.pin(kind(args[name])) for name, kind in PARTS.items() if name in args}
    return Endpoint.bind(args["store"], args["name"], parts)


class Stored(Replica):
    """A replica that gets what it answers with from a store, on whatever machine it is."""

    def __init__(self, store: str, name: str, parts: Mapping[str, Artifact]) -> None:
        """Fetch and check it.

        Raises:
            ProbeFailed: It says what the base says: a newer version is none, and the old one stays.
        """
        there = fetched(parts, Store(open_storage(store)))
        about = {("digest" if n == "model" else n): p.digest for n, p in there.items() if n != "base"}
        super().__init__(there["model"], there.get("memory"), there.get("datastore"), name, about)
        if "base" in there:
            ids = probe_ids(there["model"].path)
            own = engine_of(there["model"]).logits(ids)
            check_differs(name, own, own, there["base"], ids)


Endpoint = serve.deployment(serve.ingress()(Stored), name="Endpoint")
