"""Plan x Profile x Footprints x History -> what each step takes, where, for how long and for how much. Pure."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.capacity import Capacity, Node
from cluster.profile import GIB, HEAD, Profile
from lfm.method import STRATEGIES, Strategy
from operators.footprint import PROCESS, Footprint
from operators.resources import AUTO, Resources
from pipelines.problems import Problem

Ask = Callable[[Resources], Footprint | None]
"""What a step takes on such resources; None where nobody knows."""
Range = tuple[float, float]
MIB = 1 << 20
SLACK = 2.0
"""How much longer than its operations alone say a step may take: data, checkpoints and starting up come on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Machines of one kind.

    Attributes:
        memory: Bytes of host memory of each.
        gpu_memory: Bytes of each GPU; 0 where it is not known.
        tflops: As `Machine` has it.
        price: Of each for an hour.
        max_nodes: How many there can be.
        min_nodes: How many there are always.
        idle_s: Seconds for which one is paid for after its last step.
    """

    name: str
    cpus: float
    memory: float
    gpus: float = 0.0
    gpu_memory: float = 0.0
    accelerators: frozenset[str] = frozenset()
    tflops: float = 0.0
    price: float = 0.0
    max_nodes: int = 1
    min_nodes: int = 0
    idle_s: float = 0.0

    @property
    def node(self) -> Node:
        """What each has to give."""
        return Node(cpus=self.cpus, gpus=self.gpus, memory=self.memory, accelerators=self.accelerators)


def rooms_of(profile: Profile) -> list[Room]:
    """The machines of a profile on which steps may compute."""
    groups = {n: (g, g.min_nodes, g.max_nodes, g.idle_timeout_s) for n, g in profile.groups.items()}
    head = {HEAD: (profile.head, 1, 1, 0.0)} if profile.head_computes else {}
    return [
        Room(
            name=name,
            cpus=machine.cpus,
            memory=machine.memory,
            gpus=machine.gpus,
            gpu_memory=machine.gpu_memory_gib * GIB,
            accelerators=machine.node().accelerators,
            tflops=machine.tflops,
            price=0.0 if name == HEAD else machine.price_per_hour,  # the head is paid for anyway
            max_nodes=most,
            min_nodes=least,
            idle_s=idle,
        )
        for name, (machine, least, most, idle) in {**head, **groups}.items()
    ]


def rooms_at(capacity: Capacity) -> list[Room]:
    """The machines that there are, of which no more is known than what Ray has to give."""
    if not capacity.nodes:
        kinds = capacity.accelerators or frozenset()
        whole = Room(name="here", cpus=capacity.cpus, memory=capacity.memory, gpus=capacity.gpus, accelerators=kinds)
        return [whole]
    each = Counter(capacity.nodes)
    return [
        Room(
            name=f"machine {i + 1}",
            cpus=node.cpus,
            memory=node.memory,
            gpus=node.gpus,
            accelerators=node.accelerators,
            max_nodes=count,
        )
        for i, (node, count) in enumerate(each.items())
    ]


def nodes_in(room: Room, asks: Resources, found: Footprint | None) -> int | None:
    """How many machines a step's fewest workers take there; None where they do not fit."""
    if short_of(room, asks, found):
        return None
    held = room.node.holds(**{**asks.each, "memory": _host(asks, found)})
    needed = math.ceil(asks.least / held) if held else room.max_nodes + 1
    return needed if needed <= room.max_nodes else None


def short_of(room: Room, asks: Resources, found: Footprint | None) -> str:
    """The memory that a worker alone lacks on a machine; empty where it has enough, or nobody knows."""
    host = _host(asks, found)
    if host > room.memory:
        return f"{binary(host)} of memory, and {room.name!r} has {binary(room.memory)}"
    limit = room.gpu_memory * min(1.0, asks.gpus_per_worker)
    if found is not None and limit and found.on_device > limit:
        return f"{binary(found.on_device)} of a GPU's memory, and {room.name!r} has {binary(limit)}"
    return ""


def _host(asks: Resources, found: Footprint | None) -> float:
    return max(float(asks.memory), 0.0 if found is None else found.on_host + float(PROCESS))


def place(rooms: Sequence[Room], asks: Resources, found: Footprint | None) -> tuple[Room, int] | None:
    """The cheapest machines that hold a step, and how many: those with GPUs only where it asks for some."""
    fitting = [(room, nodes) for room in rooms if (nodes := nodes_in(room, asks, found)) is not None]
    ranked = sorted(fitting, key=lambda f: (bool(f[0].gpus) and not asks.gpus, f[0].price * f[1]))
    return ranked[0] if ranked else None


def too_large(rooms: Sequence[Room], asks: Resources, found: Footprint | None) -> str:
    """Why a step's memory fits nowhere; empty where something else is missing, which `infeasible` says, or nothing."""
    if place(rooms, asks, found) is not None or place(rooms, replace(asks, memory=0), None) is None:
        return ""
    able = [room for room in rooms if nodes_in(room, replace(asks, memory=0), None) is not None]
    lacking = [said for room in able if (said := short_of(room, asks, found))]
    if not lacking:
        lacking = [f"{asks.least} x {binary(_host(asks, found))} of memory, which {able[0].name!r} does not hold"]
    return lacking[-1]


def smallest(rooms: Sequence[Room], asks: Resources, ask: Ask, allowed: Sequence[Strategy]) -> Resources | str:
    """The first strategy with which a step fits, or why none does.

    Args:
        rooms: Machines.
        asks: What the step asks for.
        ask: What it takes with a strategy.
        allowed: The strategies that its method can be trained with.
    """
    said = ""
    for tried in _ladder(asks, allowed):
        found = ask(tried)
        if place(rooms, tried, found) is not None or found is None:
            return tried
        said = too_large(rooms, tried, found)
    return said or "what no machine has"


def _ladder(asks: Resources, allowed: Sequence[Strategy]) -> Iterator[Resources]:
    """From what moves least between workers to what holds least; ``cpu`` last, where a GPU can spare anything."""
    first: Strategy = "single" if asks.most == 1 else "ddp"
    zeros = [s for s in STRATEGIES if s.startswith("zero") and s in allowed]
    shares = zeros if asks.most > 1 else []
    for strategy in [*([first] if first in allowed else []), *shares]:
        yield replace(asks, strategy=strategy, offload="none")
    for strategy in zeros if asks.gpus else []:
        yield replace(asks, strategy=strategy, offload="cpu")


def settled(
    asked: Mapping[str, Resources], ask: Callable[[str, Resources], Footprint | None], rooms: Sequence[Room],
    allowed: Callable[[str], Sequence[Strategy]],
) -> tuple[dict[str, Resources], list[Problem]]:  # fmt: skip
    """Every step's resources with a strategy in place of ``auto``, and what is wrong where there is none.

    Args:
        asked: What steps ask for, by name.
        ask: What a step takes.
        rooms: Machines.
        allowed: The strategies that a step's method can be trained with: ``single`` of what trains nothing.
    """
    found: dict[str, Resources] = {}
    problems = []
    for name, asks in asked.items():
        if asks.strategy != AUTO:
            continue
        chosen = smallest(rooms, asks, lambda r, name=name: ask(name, r), allowed(name))  # type: ignore[misc]
        if isinstance(chosen, str):
            fix = "Lower micro_batch_size or length, train less of it (lora), or take larger machines."
            said = f"strategy='auto': the least that any takes is {chosen}, expected one that fits. {fix}"
            problems.append(Problem(("steps", name, "resources", "strategy"), said))
            chosen = replace(asks, strategy="single" if asks.most == 1 else "ddp", offload="none")
        found[name] = chosen
    return found, problems


def heavy(
    asked: Mapping[str, Resources], known: Mapping[str, Footprint | None], rooms: Sequence[Room]
) -> Iterator[Problem]:
    """Every step that takes more memory than a machine has which could hold it else."""
    for name, asks in asked.items():
        lacks = too_large(rooms, asks, known.get(name))
        if lacks:
            fix = "Lower micro_batch_size or length, set strategy to auto, or take larger machines."
            said = f"a worker takes {lacks}, expected no more than that. {fix}"
            yield Problem(("steps", name, "resources"), said)


Source = Literal["earlier runs", "operations", "trials", ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a step will take.

    Attributes:
        state: ``stored``, ``runs``, or what else a plan says.
        room: Where it computes; empty where nothing is computed.
        nodes: On how many of these, at most.
        fewest: On how many at least; another number only where that of its workers may change.
        footprint: What each worker holds; None where nobody knows.
        host: Bytes of host memory of each worker, its code too, and what a machine has for each.
        device: The same of a GPU.
        seconds: From the least to the most; None where nobody knows.
        source: What tells that.
        cost: Of these machines for that time.
    """

    state: str
    room: str = ""
    nodes: int = 0
    fewest: int = 0
    footprint: Footprint | None = None
    host: Range = (0.0, 0.0)
    device: Range = (0.0, 0.0)
    seconds: Range | None = None
    source: Source = ""
    cost: Range | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Total:
    """What a pipeline will take.

    Attributes:
        seconds: From its first step to its last, if no step waits for machines.
        steps: What the steps cost.
        head: What the head costs meanwhile.
        idle: What machines cost that wait for a step or for their end.
        unknown: Steps of which nobody knows how long they take: the rest is without them.
    """

    seconds: Range
    steps: Range
    head: Range
    idle: Range
    unknown: tuple[str, ...] = ()

    @property
    def cost(self) -> Range:
        """All of it."""
        low, high = (self.steps[i] + self.head[i] + self.idle[i] for i in (0, 1))
        return low, high


def estimate(
    state: str, asks: Resources, found: Footprint | None, rooms: Sequence[Room], history: Sequence[float]
) -> Estimate:
    """What one step will take; where the number of its workers may change, from the fewest to the most that have room.

    Args:
        state: As in `Estimate`.
        asks: What it asks for.
        found: What each worker takes.
        rooms: Machines.
        history: Seconds that steps like this one took in earlier runs.
    """
    placed = None if state == "stored" else place(rooms, asks, found)
    if placed is None:
        return Estimate(state=state, footprint=found)
    room, fewest = placed
    nodes, most = _largest(room, asks, found)
    spans, source = _spans(room, (asks, most), found, history)
    paid = [n * room.price / 3600 for n in (fewest, nodes)]
    costs = [(low * each, high * each) for (low, high), each in zip(spans, paid, strict=bool(spans))]
    return Estimate(
        state=state,
        room=room.name,
        nodes=nodes,
        fewest=fewest,
        footprint=found,
        host=(_host(asks, found), room.memory / math.ceil(asks.least / fewest)),
        device=(float(found.on_device), room.gpu_memory) if found is not None else (0.0, 0.0),
        seconds=_hull(spans),
        source=source,
        cost=_hull(costs),
    )


def _largest(room: Room, asks: Resources, found: Footprint | None) -> tuple[int, Resources]:
    """On how many machines most of a step's workers have room, and what it asks for then."""
    ends = [asks.among(n) for n in range(asks.most, asks.least, -1)]
    fitting = ((nodes, end) for end in ends if (nodes := nodes_in(room, end, found)) is not None)
    return next(fitting, (nodes_in(room, asks, found) or 0, asks))


def _spans(
    room: Room, ends: Sequence[Resources], found: Footprint | None, history: Sequence[float]
) -> tuple[list[Range], Source]:
    """From the least to the most seconds with each number of workers, and what tells that; none where nobody knows."""
    if history:
        return [(min(history), max(history)) for _ in ends], "earlier runs"
    if found is None or not found.flops or not room.tflops:
        return [], ""
    times = [found.flops / _rate(room, end) for end in ends]
    return [(time, SLACK * time) for time in times], "operations"


def _hull(of: Sequence[Range]) -> Range | None:
    return (min(r[0] for r in of), max(r[1] for r in of)) if of else None


def _rate(room: Room, asks: Resources) -> float:
    """Operations a second of all workers."""
    share = asks.gpus if asks.gpus else asks.cpus / room.cpus
    return room.tflops * 1e12 * share


def total(each: Mapping[str, Estimate], needs: Mapping[str, Sequence[str]], profile: Profile) -> Total:
    """What all steps take together.

    Args:
        each: By step, in an order in which they may run.
        needs: The steps that each takes something from.
        profile: Where they run.
    """
    ends: dict[str, Range] = {}
    for name, one in each.items():
        begun = [ends[n] for n in needs[name] if n in ends]
        low, high = one.seconds or (0.0, 0.0)
        ends[name] = max((b[0] for b in begun), default=0.0) + low, max((b[1] for b in begun), default=0.0) + high
    span = max((e[0] for e in ends.values()), default=0.0), max((e[1] for e in ends.values()), default=0.0)
    costs = [one.cost for one in each.values() if one.cost is not None]
    head = profile.head.price_per_hour / 3600
    used = {
        room.name: max((e.nodes for e in each.values() if e.room == room.name), default=0) for room in rooms_of(profile)
    }
    idle = sum(used[r.name] * r.idle_s * r.price for r in rooms_of(profile)) / 3600
    always = sum(r.min_nodes * r.price for r in rooms_of(profile)) / 3600
    return Total(
        seconds=span,
        steps=(math.fsum(c[0] for c in costs), math.fsum(c[1] for c in costs)),
        head=(head * span[0], head * span[1]),
        idle=(idle, idle + always * span[1]),
        unknown=tuple(n for n, one in each.items() if one.room and one.seconds is None),
    )


def plain(one: Estimate) -> dict[str, Any]:
    """An estimate as JSON has it."""
    held = {} if one.footprint is None else {**one.footprint.items(), "flops": one.footprint.flops}
    return {
        "state": one.state,
        "group": one.room,
        "nodes": one.nodes,
        "fewest": one.fewest,
        "memory": held,
        "host": list(one.host),
        "device": list(one.device),
        "seconds": None if one.seconds is None else list(one.seconds),
        "source": one.source,
        "cost": None if one.cost is None else list(one.cost),
    }


def binary(size: float) -> str:
    """Bytes as the machines' memory is given: GiB, and MiB of what is less than one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
