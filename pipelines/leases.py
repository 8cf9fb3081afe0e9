"""Fingerprint -> the one run that computes it now.

`leases/<fingerprint>.json` says who does. Whoever holds it writes it again, with another beat, while he works; whoever
waits takes it over when its process is dead, or when it has stayed the same for `LEASE_S` by his own clock. Clocks of
two machines are never compared.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster import processes
from cluster.processes import BEAT_S, LEASE_S
from pipelines.faults import reached
from pipelines.storage.base import Storage, StorageFailed, at_once
from pipelines.store import canonical


@dataclass(frozen=True, slots=True)
class _Seen:
    """What somebody else's lease said, and since when it says that."""

    data: bytes
    since: float


@dataclass(slots=True)
class Leases:
    """What one run holds, and what it waits for.

    Attributes:
        storage: Where leases are.
        run: The run that takes them.
        clock: Seconds of this process.
    """

    storage: Storage
    run: str
    clock: Callable[[], float] = time.monotonic
    _held: dict[str, bytes] = field(default_factory=dict)  # by fingerprint, what the lease says
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _beat: int = 0
    _due: float = 0.0

    def take(self, fingerprint: str, step: str) -> str:
        """Become the one who computes it.

        Returns:
            Nothing, or the run that computes it now: ask again later. A second step of one run waits for the first.
        """
        key, mine = _key(fingerprint), self._claim(step)
        if fingerprint in self._held:
            return "" if self.holds(fingerprint, step) else self.run
        if self.storage.put_if_absent(key, mine):
            self._take(fingerprint, mine)
            return ""
        there = self.storage.read(key)
        if there is None:  # given back in between
            return self.take(fingerprint, step)
        seen = self._seen.get(fingerprint)
        if seen is None or seen.data != there:
            seen = self._seen[fingerprint] = _Seen(there, self.clock())
        holder: Mapping[str, Any] = json.loads(there)
        silent = self.clock() - seen.since > LEASE_S
        if (silent or processes.alive(holder) is False) and self.storage.replace_if_match(key, mine, there):
            self._take(fingerprint, mine)
            return ""
        return str(holder["run"])

    def holds(self, fingerprint: str, step: str) -> bool:
        """Whether it is this step of this run that computes it."""
        mine = self._held.get(fingerprint)
        return mine is not None and bool(json.loads(mine)["step"] == step)

    def beat(self) -> None:
        """Say of all that is held that its run lives; cheap, call it often.

        Raises:
            StorageFailed: It could not be said of all; it is said again at the next beat.
        """
        now = self.clock()
        if now < self._due or not self._held:
            return
        self._due = now + BEAT_S
        self._beat += 1
        said = at_once(self._renewed, list(self._held.items()))
        self._held = {fingerprint: data for fingerprint, data, _ in said if data}
        for _, _, failure in said:
            if failure is not None:
                raise failure

    def give_back(self, fingerprint: str, step: str) -> None:
        """Let somebody else compute it, or find it in the store, where it is this step that holds it."""
        if self.holds(fingerprint, step):
            mine = self._held.pop(fingerprint)
            reached("lease: before it is given back")
            # Should somebody take it over between these two, a third one may compute it too: work twice, no harm.
            if self.storage.read(_key(fingerprint)) == mine:
                self.storage.delete(_key(fingerprint))
            reached("lease: given back")

    def give_all_back(self) -> None:
        """The same for all that is held."""
        for fingerprint, mine in tuple(self._held.items()):
            self.give_back(fingerprint, json.loads(mine)["step"])

    def _take(self, fingerprint: str, mine: bytes) -> None:
        self._held[fingerprint] = mine
        self._seen.pop(fingerprint, None)
        reached("lease: taken")
        self._due = self._due or self.clock() + BEAT_S

    def _renewed(self, held: tuple[str, bytes]) -> tuple[str, bytes, StorageFailed | None]:
        """A lease as it is now: with the new beat, with the old one where storage failed, or another run's."""
        fingerprint, old = held
        new = self._claim(json.loads(old)["step"])
        try:
            return fingerprint, new if self.storage.replace_if_match(_key(fingerprint), new, old) else b"", None
        except StorageFailed as failure:
            return fingerprint, old, failure

    def _claim(self, step: str) -> bytes:
        return canonical({**processes.this(), "run": self.run, "step": step, "beat": self._beat})


def _key(fingerprint: str) -> str:
    return f"leases/{fingerprint}.json"
