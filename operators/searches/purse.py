"""What a search may spend: whether another trial may begin, and whether those that have begun have to end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

LOOK_S = 2.0  # how old what it knows may be
END_S = 10.0  # how long it may take trials to end


@dataclass(slots=True)
class Purse:
    """Money that trials spend together.

    Attributes:
        most: All of it.
        at_once: Trials that may work at the same time.
        spent: Says what they have cost so far.
        clock: Says what time it is, in seconds.
        ended: Trials that have ended.
    """

    most: float
    at_once: int
    spent: Callable[[], float]
    clock: Callable[[], float] = time.monotonic
    ended: int = 0
    _looked: float = field(default=float("-inf"), init=False)
    _cost: float = field(default=0.0, init=False)
    _rate: float = field(default=0.0, init=False)

    def closed(self) -> bool:
        """Whether one trial more would pass it, with those beside it, if each cost what those before have cost."""
        self._look()
        each = self._cost / self.ended if self.ended else 0.0
        return self.over() or self._cost + each * self.at_once > self.most

    def over(self) -> bool:
        """Whether it would be passed if trials went on until the next look, and then took their time to end."""
        self._look()
        return self._cost + self._rate * (LOOK_S + END_S) > self.most

    def _look(self) -> None:
        now = self.clock()
        if now - self._looked < LOOK_S:
            return
        cost = self.spent()
        if self._looked > float("-inf"):
            self._rate = (cost - self._cost) / (now - self._looked)
        self._looked, self._cost = now, cost
