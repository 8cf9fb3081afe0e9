"""What a cluster has left, who waits for it, and how many workers of one step have room beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from operators.resources import Resources

MANY = 1000  # of those who wait for the same: nobody lets go of more
SHORT = 1e-6  # of a whole: sums of shares of a device are not exact


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine that stays.

    Attributes:
        name: Ray's number of it.
        free: What nobody has, by Ray's names: ``CPU``, ``GPU``, ``memory`` in bytes.
        labels: Ray's.
    """

    name: str
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A label of which a machine must have one of some values, or none of them."""

    label: str
    values: frozenset[str]
    among: bool = True

    def holds(self, node: Node) -> bool:
        """Whether a machine is as it says."""
        return (node.labels.get(self.label) in self.values) == self.among


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """What something needs on one machine."""

    needs: Mapping[str, float]
    rules: tuple[Rule, ...] = ()


Waiting = tuple[Spot, ...]
"""Somebody who waits for some spots, of which he takes all or none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """A moment of a cluster."""

    nodes: tuple[Node, ...]
    waiting: tuple[Waiting, ...] = ()

    def besides(self, held: Mapping[str, int], asks: Resources) -> "Room":
        """The same if a step let go the workers that it has on each machine."""
        each = spot(asks).needs
        nodes = tuple(
            replace(n, free={k: n.free.get(k, 0.0) + held.get(n.name, 0) * each.get(k, 0.0) for k in {*n.free, *each}})
            for n in self.nodes
        )
        return replace(self, nodes=nodes)

    def for_workers(self, asks: Resources) -> int:
        """How many workers a step is to have here, at most its most; fewer than its fewest where these have no room.

        Whoever waits comes first, where the fewest still have room beside him.
        """
        nodes = self.nodes
        for one in self.waiting:
            left = _given(nodes, one)
            if left is not None and _count(left, asks) >= asks.least:
                nodes = left
        return min(asks.most, _count(nodes, asks))


def spot(asks: Resources) -> Spot:
    """What one worker of a step needs."""
    all_of_it = {"CPU": asks.cpus_per_worker, "GPU": asks.gpus_per_worker, "memory": float(asks.memory)}
    rules = tuple(Rule(label=k, values=frozenset([v])) for k, v in asks.labels.items())
    return Spot(needs={k: v for k, v in all_of_it.items() if v}, rules=rules)


def look() -> Room:
    """The cluster of this process, as its head sees it now.

    Raises:
        RpcError: It does not answer.
    """
    import ray
    from ray.core.generated.autoscaler_pb2 import DEAD, DRAINING, GetClusterResourceStateReply

    reply = GetClusterResourceStateReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_resource_state())
    seen = reply.cluster_resource_state
    nodes = tuple(
        Node(name=n.node_id.hex(), free=dict(n.available_resources), labels=dict(n.labels))
        for n in seen.node_states
        if n.status not in (DEAD, DRAINING)
    )
    waiting: list[Waiting] = [
        (_wanted(one.request),) for one in seen.pending_resource_requests for _ in range(min(one.count, MANY))
    ]
    waiting += [tuple(map(_wanted, gang.requests)) for gang in seen.pending_gang_resource_requests]
    return Room(nodes=nodes, waiting=tuple(waiting))


def _wanted(request: Any) -> Spot:
    from ray.core.generated.common_pb2 import LABEL_OPERATOR_IN

    rules = [c for selector in request.label_selectors for c in selector.label_constraints]
    return Spot(
        needs=dict(request.resources_bundle),
        rules=tuple(
            Rule(label=c.label_key, values=frozenset(c.label_values), among=c.operator == LABEL_OPERATOR_IN)
            for c in rules
        ),
    )


def _count(nodes: Sequence[Node], asks: Resources) -> int:
    """How many workers have room."""
    return sum(_times(node, spot(asks)) for node in nodes)


def _times(node: Node, one: Spot) -> int:
    """How often a machine has such a spot."""
    if not all(rule.holds(node) for rule in one.rules):
        return 0
    return int(min(max(node.free.get(k, 0.0), 0.0) / v + SHORT for k, v in one.needs.items() if v))


def _given(nodes: tuple[Node, ...], waiting: Waiting) -> tuple[Node, ...] | None:
    """What is left where somebody got his spots; None where there are not enough."""
    for one in waiting:
        if not any(one.needs.values()):
            continue
        found = next((i for i, node in enumerate(nodes) if _times(node, one)), None)
        if found is None:
            return None
        nodes = (*nodes[:found], _less(nodes[found], one), *nodes[found + 1 :])
    return nodes


def _less(node: Node, taken: Spot) -> Node:
    return replace(node, free={k: v - taken.needs.get(k, 0.0) for k, v in node.free.items()})
