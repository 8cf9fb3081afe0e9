"""One ledger for each cluster, `ledgers/<cluster>.json`: what all runs have of it and want, so that they take turns.

Each run enters what it has and wants, by compare-and-swap, and takes that for which its turn has come
(`pipelines.turns`): nobody decides for others, and there is no process but the drivers. Who enters nothing for
`LEASE_S`, by the clock of whoever reads it, or whose process is dead, is struck out. Clocks of two machines are never
compared: each driver measures for how long its run was served, and who came first is a number.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from cluster import processes
from cluster.capacity import Capacity
from cluster.processes import BEAT_S, LEASE_S
from operators.resources import Resources
from pipelines.lineage import TRIAL
from pipelines.storage.base import Storage, StorageFailed
from pipelines.store import canonical
from pipelines.turns import KINDS, Claim, Gang, Kind, Ledger, ahead, entered, turn, without

TURN_S = 1.0  # how often a run that waits looks whether its turn has come
TRIES = 8  # so many others may enter something at the same moment; then it looks again
LEDGER = TypeAdapter(Ledger)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What somebody else's claim was, and since when it is that."""

    claim: Claim
    since: float


@dataclass(slots=True)
class Turns:
    """What one run has of a cluster that it shares with others, and what it waits for.

    A storage that fails lets nothing new start; what runs goes on.

    Attributes:
        storage: Where ledgers are.
        cluster: The cluster's name.
        run: The run.
        priority: The higher, the earlier its turn comes.
        clock: Seconds of this process.
        behind: The runs that each step waits for, as it was seen last.
    """

    storage: Storage
    cluster: str
    run: str
    priority: int = 0
    clock: Callable[[], float] = time.monotonic
    behind: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _wants: dict[str, Resources] = field(default_factory=dict)
    _holds: dict[str, Gang] = field(default_factory=dict)
    _owed: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))  # not entered yet
    _counted: float = 0.0  # up to when that is
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _beat: int = 0
    _beat_at: float = 0.0
    _look_at: float = 0.0

    def take(
        self, asked: Mapping[str, Resources], capacity: Capacity, *, unplaced: Collection[str] = (), grows: bool = False
    ) -> Collection[str]:
        """Those of some steps whose turn has come; cheap, call it often, and with all that wait.

        Args:
            asked: What each of them asks for.
            capacity: What the cluster has or can have.
            unplaced: Those that have had their turn, and for which Ray has not found a machine yet.
            grows: As of `turns.turn`.
        """
        now = self.clock()
        self._count(now)
        found = [g.step for g in self._holds.values() if not g.placed and g.step not in unplaced]
        if found:
            self._holds |= {step: replace(self._holds[step], placed=True) for step in found}
            self._look_at = self._beat_at = now
        if asked != self._wants:
            self._wants, self._look_at, self._beat_at = dict(asked), now, now
        if now < self._look_at or not (asked or now >= self._beat_at):
            return ()
        self._look_at = now + TURN_S
        with suppress(StorageFailed):  # the next time it may answer
            return self._entered(now, capacity, grows=grows)
        return ()

    def release(self, step: str) -> None:
        """Let others have what a step held, where it held something."""
        self._count(self.clock())
        if self._holds.pop(step, None) is not None:
            self._look_at = self._beat_at = self._counted

    def leave(self) -> None:
        """Want and have nothing any more; where storage does not hear of it, the claim expires."""
        now = self.clock()
        self._count(now)
        with suppress(StorageFailed):
            for _ in range(TRIES):
                there, ledger = self._read()
                if self.run not in ledger.claims or ledger.claims[self.run].by != processes.this():
                    return
                served = entered(ledger, self.run, self._claim({}, ()), self._owed)
                if self._put(without(served, {self.run, *self._silent(ledger, now)}), there):
                    return

    def _entered(self, now: float, capacity: Capacity, *, grows: bool) -> Collection[str]:
        """Enter what has changed, and take what our turn it is."""
        beat = self._beat + (now >= self._beat_at)
        for _ in range(TRIES):
            there, before = self._read()
            living = without(before, set(self._silent(before, now)))
            claim = replace(self._claim(self._wants, self._holds.values()), beat=beat)
            after = turn(entered(living, self.run, claim, self._owed), self.run, capacity, grows=grows)
            self.behind = ahead(after, self.run)
            if after.claims == before.claims:
                return ()
            if self._put(after, there):
                self._beat, self._beat_at = beat, now + BEAT_S
                self._owed = dict.fromkeys(KINDS, 0.0)
                return self._granted(after.claims[self.run])
        return ()

    def _granted(self, claim: Claim) -> Collection[str]:
        new = {g.step: g for g in claim.holds if g.step not in self._holds}
        self._holds |= new
        self._wants = {step: asks for step, asks in self._wants.items() if step not in new}
        return new.keys()

    def _silent(self, ledger: Ledger, now: float) -> Iterator[str]:
        """The runs whose driver is dead, or has entered nothing for so long that it counts as such."""
        known = {run: self._seen.get(run, _Seen(claim, now)) for run, claim in ledger.claims.items()}
        self._seen = {
            run: one if one.claim == ledger.claims[run] else _Seen(ledger.claims[run], now)
            for run, one in known.items()
            if run != self.run
        }
        for run, one in self._seen.items():
            if now - one.since > LEASE_S or processes.alive(one.claim.by) is False:
                yield run

    def _claim(self, wants: Mapping[str, Resources], holds: Iterable[Gang]) -> Claim:
        return Claim(
            account=self.run.partition(TRIAL)[0],
            priority=self.priority,
            wants=tuple(Gang(step=step, asks=asks) for step, asks in wants.items()),
            holds=tuple(holds),
            by=processes.this(),
        )

    def _count(self, now: float) -> None:
        for gang in self._holds.values():
            self._owed[gang.kind] += gang.amount * (now - self._counted)
        self._counted = now

    def _read(self) -> tuple[bytes | None, Ledger]:
        there = self.storage.read(self._key)
        return there, Ledger() if there is None else LEDGER.validate_json(there)

    def _put(self, ledger: Ledger, old: bytes | None) -> bool:
        new = canonical(LEDGER.dump_python(ledger, mode="json"))
        if old is None:
            return self.storage.put_if_absent(self._key, new)
        return self.storage.replace_if_match(self._key, new, old)

    @property
    def _key(self) -> str:
        return f"ledgers/{self.cluster}.json"
