"""A group whose number of workers changes: one group after another, each of which goes on from what the last one kept.

Ray Train's own elasticity counts what a cluster has, and not what others use of it: it would ask for places that
steps beside this one have, and lose its own meanwhile. So each group has a fixed number, and this decides which.
"""

import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm.errors import LfmError
from operators.learning.group import ASKED, LEFT, NODE, GroupFailed, Listener
from operators.resources import Resources
from operators.sharing.notices import NodeLost, Preempted
from operators.sharing.room import Room, look, spot
from operators.workspace import Workspace

LOOK_S = 5.0  # how often a group looks for room; two looks have to agree
GROW_S = 60.0  # how long a group works before it takes more, and for how long there has to be work then
SETTLE_S = 30.0  # how long the cluster may take to see what a group has let go
GOES = "a machine is about to be taken away"
STALLED = 3  # groups in a row that end before they have kept anything
ASK_S, ASKED_FOR_S = 20.0, 180.0  # how often the autoscaler is asked for the most workers, and how long that counts

Start = Callable[[int, Path], dict[str, int]]
"""Trains with so many workers in a folder; the answer has `LEFT` where they ended because they were told to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a group that ended leaves to the next one.

    Attributes:
        why: In a few words.
        hoped: How many workers there should be room for.
        failure: What the step ends with where it is to end.
        waits: Whether the fewest wait for room as those of any group do; else it ends where they have none.
    """

    why: str
    hoped: int
    failure: LfmError
    waits: bool = False


def trained(work: Workspace, asks: Resources, home: Path, start: Start) -> tuple[Path, dict[str, int]]:
    """Train with as many workers as have room, group after group; returns the last one's folder and what it told.

    Raises:
        NodeLost: A machine was lost, and not even the fewest workers have room any more; or it happens all the time.
        Preempted: This machine is about to be taken away, or so many others.
        GroupFailed: Something else ended a group.
    """
    number, why = max(asks.least, _room(asks, hoped=0)), f"{asks.spoken} may share the work"
    kept, stalled = work.kept(), 0
    for turn in itertools.count(1):
        folder = home / f"group-{turn}"
        folder.mkdir()
        work.regrouped(number, why)
        ended = _ended(asks, number, folder, start)
        if isinstance(ended, dict):
            return folder, ended
        stalled = stalled + 1 if work.kept() == kept else 0
        found, kept, why = _room(asks, hoped=ended.hoped), work.kept(), ended.why
        if work.leaving() or stalled == STALLED or (found < asks.least and not ended.waits):
            raise ended.failure
        number = max(asks.least, found)
    raise AssertionError("unreachable")


def _ended(asks: Resources, number: int, folder: Path, start: Start) -> dict[str, int] | Change:
    """What a group told when it was done, or why there is to be another one."""
    try:
        told = start(number, folder)
    except NodeLost as lost:
        return Change(why="a machine was lost", hoped=_left(asks, folder, lost.nodes), failure=lost)
    except GroupFailed as failed:
        if failed.started or number == asks.least:
            raise
        return Change(why="others took the room for more", hoped=asks.least, failure=failed, waits=True)
    if LEFT not in told:
        return told
    failure = Preempted(told[LEFT], told["of"])
    if (folder / ASKED).exists():
        asked = json.loads((folder / ASKED).read_text())
        return Change(why=asked["why"], hoped=asked["workers"], failure=failure, waits=True)
    stay = {node.name for node in _seen().nodes}
    return Change(why=GOES, hoped=_left(asks, folder, _places(folder).keys() - stay), failure=failure)


def _places(folder: Path) -> Counter[str]:
    """How many workers of a group are on each machine."""
    return Counter(path.read_text() for path in folder.glob(f"{NODE}-*"))


def _left(asks: Resources, folder: Path, gone: Collection[str]) -> int:
    """For how many workers there should be room without some machines: at least where the others of a group were."""
    return max(asks.least, sum(count for node, count in _places(folder).items() if node not in gone))


def _seen() -> Room:
    """The cluster; without a machine where its head does not answer."""
    from ray.exceptions import RpcError

    try:
        return look()
    except RpcError:
        return Room(nodes=())


def _room(asks: Resources, *, hoped: int) -> int:
    """How many workers have room, once there is as much as is hoped for or it took too long."""
    until = time.monotonic() + SETTLE_S
    while (found := _seen().for_workers(asks)) < hoped and time.monotonic() < until:
        time.sleep(0.2)
    return found


def due(asks: Resources, number: int, found: int, *, worked_s: float, left_s: float) -> bool:
    """Whether a group of so many workers is to end, because there should be another number of them.

    Args:
        asks: What the step asks for.
        number: How many there are.
        found: For how many there is room beside whoever waits.
        worked_s: For how many seconds the group has learnt.
        left_s: How many it has to go, as fast as it is.
    """
    if found < asks.least or found == number:
        return False
    return found < number or min(worked_s, left_s) >= GROW_S


@contextmanager
def watched(asks: Resources, number: int, folder: Path, heard: Listener) -> Iterator[None]:
    """While a group works, have it end where there should be another number, and ask the autoscaler for the most.

    Nothing happens where that number stays.
    """
    if not asks.elastic:
        yield
        return
    ended, wish = threading.Event(), _Wish(asks, asks.most - number, str(folder))
    thread = threading.Thread(target=_watch, args=(asks, number, folder, heard, wish, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        wish.over()


def _watch(asks: Resources, number: int, folder: Path, heard: Listener, wish: "_Wish", ended: threading.Event) -> None:
    last = number
    while not ended.wait(LOOK_S):
        wish.said()
        held = _places(folder)
        if held.total() < number:
            continue  # it has not begun
        seen = _seen()
        found = seen.besides(held, asks).for_workers(asks)
        if found == last and due(asks, number, found, worked_s=heard.worked_s, left_s=heard.left_s):
            _end(folder, found, _why(number, found, seen, held))
            return
        last = found


def _why(number: int, found: int, seen: Room, held: Counter[str]) -> str:
    if found > number:
        return "there is room for more"
    return "another step waits" if {n.name for n in seen.nodes} >= held.keys() else GOES


def _end(folder: Path, workers: int, why: str) -> None:
    """Ask a group to keep what it has and to end; its first worker sees the file."""
    (folder / f"{ASKED}.new").write_text(json.dumps({"workers": workers, "why": why}))
    os.replace(folder / f"{ASKED}.new", folder / ASKED)


class _Wish:
    """The workers that a step would take beside those that it has, as Ray's autoscaler hears of them.

    All that ask it on a cluster go through one actor of Ray's, which adds them up: the autoscaler itself knows only
    who asked last.
    """

    def __init__(self, asks: Resources, more: int, who: str) -> None:
        self.each, self.labels, self.more, self.who = dict(spot(asks).needs), asks.labels, more, who
        self.due = 0.0

    def said(self) -> None:
        """Say it, or say it again before it counts no more."""
        if self.more and time.monotonic() >= self.due:
            from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import ResourceRequestPriority
            from ray.exceptions import RayError

            self.due = time.monotonic() + ASK_S
            with suppress(RayError):  # it is said again
                _adder().request_resources.remote(
                    requester_id=self.who,
                    resources=[self.each] * self.more,
                    label_selectors=[self.labels] * self.more,
                    expire_after_s=ASKED_FOR_S,
                    priority=ResourceRequestPriority.LOW,
                )

    def over(self) -> None:
        """Take it back."""
        if self.due:
            from ray.exceptions import RayError

            with suppress(RayError):  # then it ends by itself
                _adder().cancel_request.remote(requester_id=self.who)


def _adder() -> Any:
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator()
