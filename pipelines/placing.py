"""What a step asks for x what there is -> on which machines it may be put. Pure."""

from dataclasses import replace

from cluster.capacity import Capacity
from operators.resources import Resources


def placed(asks: Resources, there: Capacity) -> Resources:
    """The same, kept off machines with GPUs where it needs none and those without could hold all of its workers.

    Ray takes any node that has enough, and its autoscaler brings any such: one with GPUs for a step without.
    """
    if asks.gpus or asks.avoid:
        return asks
    plain = [n for n in there.nodes if not n.gpus]
    return replace(asks, avoid=kinds(there)) if sum(n.holds(**asks.each) for n in plain) >= asks.least else asks


def waiting(there: Capacity) -> Resources:
    """What a process asks for that only waits for the workers that it has started: a place without GPUs."""
    plain = any(not n.gpus for n in there.nodes)
    return Resources(avoid=kinds(there) if plain else ())


def kinds(there: Capacity) -> tuple[str, ...]:
    """The kinds of GPU that there are, by their names."""
    return tuple(sorted({kind for n in there.nodes for kind in n.accelerators}))
