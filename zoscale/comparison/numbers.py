"""Numbers over runs, and how they are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Finite values of some runs.

    Args:
        mean: of the runs.
        low: the smallest.
        high: the largest.
        num: of runs.
    """

    mean: float
    low: float
    high: float
    num: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Of the values that are finite numbers; None if there are none."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        return cls(math.fsum(known) / len(known), min(known), max(known), len(known)) if known else None


def short(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits, thousands grouped."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value and not 0.1 <= abs(value) < 1e15:
        return f"{value:.{digits}g}"
    if value.is_integer():
        return f"{value:,.0f}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole)}f}"


def spread(value: Spread | None) -> str:
    """The mean, and the range over runs where they differ."""
    if value is None:
        return "-"
    if value.low == value.high:
        return short(value.mean)
    return f"{short(value.mean)} [{short(value.low)}, {short(value.high)}]"


def mebibytes(value: float | None) -> str:
    """Bytes as MiB, large numbers as GiB."""
    if value is None:
        return "-"
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
