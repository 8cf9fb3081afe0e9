"""What lives at a Ray head, as JSON: run as ``python -m cluster.look ADDRESS``, or as a text on a machine without us.

It needs nothing but Ray, and is a process of its own because Ray reads when it is imported how it is to authenticate.
"""

import json
import sys
import time
from typing import Any


def main(address: str) -> None:
    """Print nodes and jobs of the cluster whose head is at `address`."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    client = ray._raylet.GcsClient(address=address)
    now = get_cluster_status(address, timeout=30)
    idle = {
        n.node_id: n.resource_usage.idle_time_ms / 1000
        for n in (*now.idle_nodes, *now.active_nodes)
        if n.resource_usage is not None
    }
    nodes = [_node(n, idle) for n in client.get_all_node_info(timeout=30).values()]
    jobs = [_job(j) for j in client.get_all_job_info(skip_is_running_tasks_field=True).values() if _a_users(j)]
    sys.stdout.write(json.dumps({"time": time.time(), "nodes": nodes, "jobs": jobs}))


def _node(info: Any, idle: dict[str, float]) -> dict[str, Any]:
    labels, has, name = dict(info.labels), dict(info.resources_total), info.node_id.hex()
    return {
        "id": name,
        "name": info.node_name,
        "group": "head" if info.is_head_node else labels.get("ray.io/node-group", ""),
        "market": labels.get("ray.io/market-type", ""),
        "alive": info.state == info.ALIVE,
        "began": info.start_time_ms / 1000,
        "ended": info.end_time_ms / 1000,
        "cpus": has.get("CPU", 0.0),
        "gpus": has.get("GPU", 0.0),
        "idle_s": idle.get(name, 0.0),
    }


def _a_users(info: Any) -> bool:
    return not info.config.ray_namespace.startswith("_ray_internal_")


def _job(info: Any) -> dict[str, Any]:
    return {
        "id": info.config.metadata.get("job_submission_id", "") or info.job_id.hex(),
        "does": info.entrypoint,
        "began": info.start_time / 1000,
        "running": not info.is_dead,
    }


if __name__ == "__main__":
    main(sys.argv[1])
