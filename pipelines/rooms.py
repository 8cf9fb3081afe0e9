"""Gangs x machines -> what is free then. Pure, and as fast for a thousand machines as for the kinds of them.

Which machine Ray gives a worker, it does not say beforehand: what runs is thought to be packed as tightly as it goes.
Where that is wrong, what comes next has its turn and no place (`closed`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.capacity import Capacity, Node
from operators.resources import Resources


@dataclass(frozen=True, slots=True)
class Room:
    """A machine, and what is free of it: less than nothing where somebody waits for more."""

    whole: Node
    free: Node

    def after(self, asks: Resources, workers: int) -> "Room":
        """The same when so many more workers have their places there."""
        free = replace(
            self.free,
            cpus=round(self.free.cpus - workers * asks.cpus_per_worker, 6),
            gpus=round(self.free.gpus - workers * asks.gpus_per_worker, 6),
            memory=self.free.memory - workers * asks.memory,
        )
        return Room(self.whole, free)


Rooms = Counter[Room]
"""How many machines there are of each kind, and of what is free of them."""


def rooms(capacity: Capacity) -> Rooms:
    """The machines of a cluster, empty."""
    return Counter(Room(node, node) for node in capacity.machines)


def placed(asks: Resources, free: Rooms) -> Rooms | None:
    """What is free once all workers have their places; None where there is no room for all.

    Machines with little left come first, and for what needs no GPUs those without.
    """
    tightest = sorted(free, key=_size)
    left, missing = _filled(asks, free, [(room, room.free.holds(**asks.each)) for room in tightest])
    return None if missing else left


def reserved(asks: Resources, free: Rooms) -> Rooms:
    """What others may have while all workers wait for places: the machines where most is free are kept for them."""
    emptiest = sorted(free, key=lambda room: (room.free.holds(**asks.each), *_size(room)), reverse=True)
    left, _ = _filled(asks, free, [(room, room.whole.holds(**asks.each)) for room in emptiest])
    return left


def taken(held: Sequence[Resources], free: Rooms) -> Rooms:
    """What is free beside all that is held; what finds no place any more, because machines have gone, waits for one."""
    largest = sorted(held, key=lambda asks: (asks.gpus_per_worker, asks.cpus_per_worker, asks.memory), reverse=True)
    for asks in largest:
        left = placed(asks, free)
        free = reserved(asks, free) if left is None else left
    return free


def closed(asks: Resources, free: Rooms) -> Rooms:
    """What is free where no machine that could hold one of the workers takes anything else."""
    none = Node(cpus=0.0, memory=0.0)
    left: Rooms = Counter()
    for room, machines in free.items():
        left[Room(room.whole, none) if room.whole.holds(**asks.each) > 0 else room] += machines
    return left


def _size(room: Room) -> tuple[float, float, float]:
    return room.free.gpus, room.free.cpus, room.free.memory


def _filled(asks: Resources, free: Rooms, takes: Sequence[tuple[Room, int]]) -> tuple[Rooms, int]:
    """What is free when machines of each kind, one after the other, take as many workers; and how many none takes."""
    left, missing = free.copy(), asks.least
    for room, each in takes:
        if each <= 0 or not missing:
            continue
        here = min(missing, each * free[room])
        full, rest = divmod(here, each)
        for machines, workers in ((full, each), (1, rest)):
            if machines and workers:
                left[room] -= machines
                left[room.after(asks, workers)] += machines
        missing -= here
    return +left, missing
