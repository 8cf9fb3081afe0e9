"""What must hold of a document for Ray's own launcher, beside what its schema says."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.manifests.finding import Rules, Said, at, whole
from cluster.manifests.launcher import TOKEN
from cluster.manifests.pod_rules import secret
from cluster.manifests.pods import DRAIN
from cluster.profile import ACCELERATOR_LABEL, GROUP_LABEL, MARKET_LABEL

Document = Mapping[str, Any]
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
DEFAULTS = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands", "file_mounts",
            "cluster_synced_files", "docker", "auth", *STARTS)  # fmt: skip
"""What the launcher would otherwise fill in: among it a nightly Ray, and machines that can be taken away."""


def _types(document: Document) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from at(document, "available_node_types", {}).items()


def _said(document: Document, key: str) -> str:
    return "\n".join(document.get(key) or [])


def _head(document: Document) -> Said:
    name = document.get("head_node_type")
    said = at(document, "available_node_types", {}).get(name)
    if said is None:
        yield "head_node_type", f"{name!r}, expected one of available_node_types"
    elif (said.get("min_workers"), said.get("max_workers")) != (0, 0):
        yield f"available_node_types.{name}", "more machines than the head, expected none"
    elif _spot(said):
        yield f"available_node_types.{name}", "a head that can be taken away, expected it on demand"


def _machines(document: Document) -> Said:
    least = most = 0
    for name, said in _types(document):
        low, high = said.get("min_workers"), said.get("max_workers")
        if not (whole(low) and whole(high) and low <= high):
            yield f"available_node_types.{name}", f"min_workers={low!r}, max_workers={high!r}, expected both in order"
            return
        least, most = least + low, most + high
    if not whole(document.get("max_workers")) or not least <= document["max_workers"] == most:
        yield "max_workers", f"{document.get('max_workers')!r}, expected {most}, as many as all groups may have"


def _market(document: Document) -> Said:
    for name, said in _types(document):
        market, wanted = at(said, "labels", {}).get(MARKET_LABEL), "spot" if _spot(said) else "on-demand"
        if market != wanted:
            yield (
                f"available_node_types.{name}.labels",
                f"{MARKET_LABEL}={market!r}, expected {wanted!r} as the machine is",
            )
        if (group := at(said, "labels", {}).get(GROUP_LABEL)) != name:
            yield f"available_node_types.{name}.labels", f"{GROUP_LABEL}={group!r}, expected {name!r}"


def _spot(said: Mapping[str, Any]) -> bool:
    node = said.get("node_config", {})
    return bool(node.get("InstanceMarketOptions")) or at(node, "scheduling.provisioningModel") == "SPOT"


def _gpus(document: Document) -> Said:
    for name, said in _types(document):
        kind = at(said, "labels", {}).get(ACCELERATOR_LABEL)
        if bool(kind) != bool(at(said, "resources", {}).get("GPU")):
            yield (
                f"available_node_types.{name}.labels",
                f"{ACCELERATOR_LABEL}={kind!r}, expected the GPU's kind where one is",
            )


def _resources(document: Document) -> Said:
    for name, said in _types(document):
        if not {"CPU", "memory"} <= {*at(said, "resources", {})}:
            yield f"available_node_types.{name}.resources", "no CPU or no memory, expected what Ray may give there"


def _autoscaler(document: Document) -> Said:
    head = _said(document, STARTS[0])
    if "RAY_enable_autoscaler_v2=1" not in head or "--autoscaling-config=" not in head:
        yield STARTS[0], "no autoscaler of the second version, expected RAY_enable_autoscaler_v2=1 and its config"


def _token(document: Document) -> Said:
    for key in STARTS:
        if "RAY_AUTH_MODE=token" not in _said(document, key):
            yield key, "no RAY_AUTH_MODE=token, expected it at every start"
    if TOKEN not in at(document, "file_mounts", {}):
        yield "file_mounts", f"no {TOKEN}, expected the token's file"


def _drain(document: Document) -> Said:
    for key in STARTS:
        if not re.search(rf"\b{DRAIN}=[0-9.]+", _said(document, key)):
            yield key, f"no {DRAIN}, expected seconds for work to come to an end"


def _explicit(document: Document) -> Said:
    for key in DEFAULTS:
        if key not in document:
            yield key, "left to the launcher's default, expected it said"
    if not at(document, "docker.image") or not at(document, "docker.container_name"):
        yield "docker", "no image or no container_name, expected both"


def _secrets(document: Document) -> Said:
    for key in STARTS:
        for name in re.findall(r"\b(\w+)=", _said(document, key)):
            if secret(name):
                fix = "Have the image or the machine's own identity hold it"
                yield key, f"{name} with a value, expected no secret in a document. {fix}"


LAUNCHER_RULES: Rules = {
    "head": _head,
    "machines": _machines,
    "market": _market,
    "gpus": _gpus,
    "resources": _resources,
    "autoscaler": _autoscaler,
    "token": _token,
    "grace": _drain,
    "explicit": _explicit,
    "secrets": _secrets,
}
