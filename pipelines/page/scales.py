"""Values -> places on an axis, its ticks and how numbers are written beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipelines.view import seconds as duration

MINUS = "\N{MINUS SIGN}"  # as wide as a plus
LOG_ABOVE = 20.0  # a linear axis squeezes what varies more than this into a line at the bottom
ROUND_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values onto lengths.

    Attributes:
        low: The value at `start`.
        high: The value at `end`.
        start: Where it begins.
        end: Where it ends; before `start` where it points up.
        logarithmic: Whether equal ratios are equally long.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies."""
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def fitted(values: Sequence[float], start: float, end: float) -> Scale:
    """A linear scale with room for all values."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, start, end)


def fitted_wide(values: Sequence[float], start: float, end: float) -> Scale:
    """The same, logarithmic where the values vary much."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_ABOVE:
        return Scale(low / 1.1, high * 1.1, start, end, logarithmic=True)
    return fitted(values, start, end)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values between two others, `count` of them or a few less."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """The same for a logarithmic axis: powers of ten, with 2 and 5 times these where there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**p for p in range(first, last + 1) for m in multiples if low <= m * 10.0**p <= high]
        if len(found) <= count + 1:
            return found
    return found[:: math.ceil(len(found) / count)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Ticks of a linear axis, with just the decimals that tell one from the next."""
    step = min((b - a for a, b in pairwise(values)), default=0.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 9
    if decimals > 6 or max(abs(v) for v in values) >= 1e6:
        return [brief(v) for v in values]
    return [f"{v:.{decimals}f}".replace("-", MINUS) for v in values]


def time_ticks(total: float, count: int) -> list[float]:
    """Round times from 0 to `total` seconds."""
    for step in ROUND_SECONDS:
        if total / step <= count:
            return [float(i * step) for i in range(int(total / step) + 1)]
    days = math.ceil(total / ROUND_SECONDS[-1] / count) * ROUND_SECONDS[-1]
    return [float(i * days) for i in range(int(total / days) + 1)]


def clock(value: float) -> str:
    """A tick of a time axis."""
    hours, rest = divmod(round(value), 3600)
    parts = [(hours, "h"), (rest // 60, "min"), (rest % 60, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0"


def brief(value: float, digits: int = 4) -> str:
    """A number with as many digits as a reader compares."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        mantissa, _, power = f"{value:.{min(digits, 3) - 1}e}".partition("e")
        written = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"
    else:
        written = f"{value:.{digits}g}" if size < 10**digits else f"{value:.0f}"
    return written.replace("-", MINUS)


def alike(values: Sequence[float]) -> list[str]:
    """Numbers to compare with one another: with as many decimals each, three digits or more of the largest."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if largest and (largest < 1e-2 or largest >= 1e6):
        return [brief(v) for v in values]
    decimals = 3 if largest < 10 else 2 if largest < 100 else 1
    return [f"{v:.{decimals}f}".replace("-", MINUS) for v in values]


def took(value: float) -> str:
    """How long something took."""
    return f"{value * 1000:.0f} ms" if 0 < value < 0.1 else duration(value)
