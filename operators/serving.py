"""The verb `serve`: a model behind the OpenAI API, live once it has proved that it is the right one."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm.errors import LfmError
from operators.artifact import Artifact, Datastore, Deployment, Memory, Model
from operators.base import operator
from operators.data.facts import carried, spoken
from operators.engines.consulting import engine_of
from operators.engines.native import Native
from operators.engines.ports import LAST_PORT, check_port
from operators.models.datastore_files import not_both, unfit as unfit_datastore
from operators.models.language_models import load_tokenizer
from operators.models.memory_files import unfit
from operators.resources import Resources
from operators.workspace import Workspace

PROBE_TOKENS = 16
Asked = Callable[[Sequence[int]], Tensor]
"""What a replica says after each token of a text."""
TOLERANCE = 1e-4  # of the largest logit: the same weights on the same kind of device, perhaps in other threads
ROUNDINGS = 8  # how many of a dtype's another kind of device may be away, where that is more


class ProbeFailed(LfmError, RuntimeError):
    """An endpoint that does not answer as the model it should serve."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)
        self.name, self.what = name, what

    def __str__(self) -> str:
        return f"endpoint {self.name!r}: its probe's logits {self.what}. It is taken down again; serve it anew."


class EndpointTaken(LfmError, RuntimeError):
    """A second model for one endpoint."""

    def __init__(self, name: str, other: str) -> None:
        super().__init__(name, other)
        self.name, self.other = name, other

    def __str__(self) -> str:
        return (
            f"endpoint {self.name!r}: this Ray serves {self.other!r} below /v1 already, expected one model. "
            "Stop that run first, or serve on a Ray of its own."
        )


def _problems(
    *,
    name: str,
    port: int,
    resources: Resources,
    model: Model | None,
    memory: Memory | None = None,
    datastore: Datastore | None = None,
    kinds: Mapping[str, Sequence[type[Artifact]]],
    **_: object,
) -> Iterator[str]:
    if resources.most > 1:
        yield f"workers={resources.spoken}, expected 1: an endpoint has one replica. Leave it out."
    if not 1 <= port <= LAST_PORT:
        yield f"port={port}, expected 1 <= port <= {LAST_PORT}. Give another one."
    if not name.strip():
        yield f"name={name!r}, expected what requests call the model. Give it one."
    if memory is not None:
        yield from map(str, unfit(memory, model))
    if datastore is not None:
        yield from map(str, unfit_datastore("serve", datastore, model))
    if "memory" in kinds and "datastore" in kinds:
        yield str(not_both("serve"))


@operator(effect=True, starts_workers=True, problems=_problems, takes_ensembles=("model", "base"))
def serve(
    work: Workspace,
    *,
    model: Model,
    base: Model | None = None,
    memory: Memory | None = None,
    datastore: Datastore | None = None,
    name: str = "model",
    host: str = "127.0.0.1",
    port: int = 8000,
) -> Deployment:
    """Bring up one Ray Serve application that answers the OpenAI API below ``/v1``.

    Its replica computes on the GPU, or the share of one, that the step asks for.

    Args:
        work: The step's workspace.
        model: What is served.
        base: A model that it must differ from, such as what it was merged from.
        memory: What the model consults while it answers.
        datastore: Of this model: what it says is mixed with what followed in similar places. Not with a memory.
        name: What requests call it.
        host: Where it listens.
        port: The same.

    Raises:
        PortBusy: Another process listens there.
        EndpointTaken: This Ray serves another model already.
        ProbeFailed: The replica's logits are not the artifact's, or are the base's, or it does not consult the memory
            or the datastore.
        OtherMemory: The memory was not made for this very model.
        OtherModel: The datastore was not.
        DatastoreError: It cannot be read, or a memory is given too.
    """
    from ray import serve as ray_serve

    from operators.engines.endpoint import Endpoint

    if not _serving(ray_serve):
        check_port("endpoint", host, port)
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    given = {"memory": memory, "datastore": datastore}
    beside = {kind: each.digest for kind, each in given.items() if each is not None}
    about = {"digest": model.digest, **beside}
    others = [n for n in ray_serve.status().applications if n != name]
    if others:
        raise EndpointTaken(name, others[0])
    wanted = engine_of(model, memory, datastore)
    app = Endpoint.options(ray_actor_options=_asks(work.resources)).bind(model, memory, datastore, name, about)
    handle = ray_serve.run(app, name=name, route_prefix="/")

    def asked(ids: Sequence[int]) -> Tensor:
        return torch.tensor(handle.probe.remote(ids).result(timeout_s=120))

    tolerance = tolerated(wanted, work.resources)
    try:
        proof = _prove(name, asked, wanted, model, base, probe_ids(model.path), tolerance)
        if memory is not None:
            proof |= _prove_memory(name, asked, wanted, model, memory, tolerance)
    except BaseException:
        ray_serve.delete(name)
        raise
    file = work.scratch / "deployment.json"
    found = {"url": f"http://{host}:{port}/v1", "name": name, "model": model.digest, **beside, "probe": proof}
    file.write_text(json.dumps(found, indent=2))
    return work.save(Deployment, file, found)


def take_down(name: str, digest: str) -> None:
    """Delete the application `name` of the connected Ray, unless by now it serves another model."""
    from ray import serve as ray_serve

    if not _serving(ray_serve) or name not in ray_serve.status().applications:
        return
    about = ray_serve.get_app_handle(name).identity.remote().result(timeout_s=60)
    if about["digest"] == digest:
        ray_serve.delete(name)


def probe_ids(folder: Path) -> list[int]:
    """A few tokens from all over the vocabulary."""
    vocabulary = len(load_tokenizer(folder))
    return [(i * 7919 + 11) % vocabulary for i in range(PROBE_TOKENS)]


def tolerated(wanted: Native, resources: Resources) -> float:
    """How far a replica's logits may be from those that this process computes, over the largest.

    Another kind of device adds up in another order, and rounds otherwise where the weights have few digits.
    """
    first = next(wanted.model.parameters())
    if first.device.type == resources.device:
        return TOLERANCE
    return max(TOLERANCE, ROUNDINGS * torch.finfo(first.dtype).eps)


def _prove(
    name: str,
    asked: Asked,
    wanted: Native,
    model: Model,
    base: Model | None,
    ids: Sequence[int],
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """The largest differences of logits, over the largest logit: from the artifact's, and from the base's.

    With a datastore what is said are log-probabilities, and how far they are from the model's alone is told too; it is
    the model alone that has to differ from the base.
    """
    answered, own = asked(ids), wanted.logits(ids)
    proof = {"from_artifact": _distance(answered, own)}
    if proof["from_artifact"] > tolerance:
        raise ProbeFailed(name, f"differ from the artifact's by {proof['from_artifact']:.2g}")
    if wanted.search is not None:
        alone = engine_of(model).logits(ids)
        proof["from_model_alone"] = _distance(answered, alone.log_softmax(dim=-1))
        answered = own = alone
    if base is not None:
        proof["from_base"] = check_differs(name, answered, own, base, ids)
    return proof


def check_differs(name: str, answered: Tensor, own: Tensor, base: Model, ids: Sequence[int]) -> float:
    """How far logits are from a base's, over the largest.

    Args:
        name: The endpoint.
        answered: What it says.
        own: What its model says here: as far as another device rounds otherwise, it has to be nearer to that.
        base: What it must differ from.
        ids: Where it was asked.

    Raises:
        ProbeFailed: They are the base's.
    """
    others = engine_of(base).logits(ids)
    distance = _distance(answered, others)
    if distance <= TOLERANCE or not _nearer(answered, own, others):
        raise ProbeFailed(name, "are the base's too")
    return distance


def _prove_memory(
    name: str, asked: Asked, wanted: Native, model: Model, memory: Memory, tolerance: float = TOLERANCE
) -> dict[str, float]:
    """The same at the prompt of a fact of which the model alone says something else; nothing where there is none."""
    alone = engine_of(model)
    for fact in carried(memory.path):
        ids, _ = spoken(fact.prompt, fact.target, wanted.tokenizer)
        with_it, without = wanted.logits(ids), alone.logits(ids)
        if _distance(with_it, without) <= TOLERANCE:
            continue
        answered = asked(ids)
        proof = {"from_memory": _distance(answered, with_it), "from_model_alone": _distance(answered, without)}
        if proof["from_memory"] > tolerance or not _nearer(answered, with_it, without):
            raise ProbeFailed(name, f"differ from the memory's by {proof['from_memory']:.2g}")
        return proof
    return {}


def _distance(answered: Tensor, wanted: Tensor) -> float:
    return float((answered - wanted).abs().max() / wanted.abs().max())


def _nearer(answered: Tensor, wanted: Tensor, other: Tensor) -> bool:
    """Whether all logits together are nearer to the wanted ones: what is rounded otherwise evens out among them."""
    return bool((answered - wanted).norm() < (answered - other).norm())


def _asks(asks: Resources) -> dict[str, Any]:
    """What the replica's process is given; Ray Serve has no word for no memory."""
    memory = {"memory": asks.memory} if asks.memory else {}
    each = {"num_cpus": asks.cpus_per_worker, "num_gpus": asks.gpus_per_worker, **memory}
    return {**each, "label_selector": asks.labels}


def _serving(ray_serve: Any) -> bool:
    """Whether this cluster's Serve is up already, and holds the port itself."""
    from ray.serve.exceptions import RayServeException

    try:
        return bool(ray_serve.status().proxies)
    except RayServeException:  # there is none
        return False
