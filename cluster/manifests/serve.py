"""Endpoint -> the config with which Ray Serve deploys it."""

from collections.abc import Mapping
from typing import Any

from cluster.manifests.job import Served

BUILDER = "pipelines.endpoints:application"
"""What makes an application of a config's arguments, on the cluster."""


def serve_config(endpoint: Served, *, store: str, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The config of one endpoint.

    Args:
        endpoint: What is served.
        store: Where its parts are found.
        environment: What Ray brings to its processes (`runtime_env`).
    """
    actor: dict[str, Any] = {"num_cpus": endpoint.cpus, "num_gpus": endpoint.gpus}
    if endpoint.memory:
        actor["memory"] = endpoint.memory
    if endpoint.labels:
        actor["label_selector"] = dict(endpoint.labels)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": endpoint.port},
        "applications": [
            {
                "name": endpoint.name,
                "route_prefix": "/",
                "import_path": BUILDER,
                **({"runtime_env": dict(environment)} if environment else {}),
                "args": {"store": store, "name": endpoint.name, **endpoint.inputs},
                "deployments": [{"name": "Endpoint", "num_replicas": 1, "ray_actor_options": actor}],
            }
        ],
    }
