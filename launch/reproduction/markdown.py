"""Tables and figures of a report as Markdown."""

from collections.abc import Sequence

from zoscale.comparison.numbers import Spread


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its header."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)) + "\n"


def percent(spread: Spread | None, num_asked: int | None = None) -> str:
    """The mean in percent, with the range and the number of the seeds where there are several, or fewer than asked."""
    if spread is None:
        return "-"
    mean, num = f"{100 * spread.mean:.1f}", seeds(spread.num, num_asked)
    if spread.num == 1:
        return mean if num == "one seed" else f"{mean} ({num})"
    return f"{mean} ({100 * spread.low:.1f} to {100 * spread.high:.1f}, {num})"


def seeds(num: int, num_asked: int | None) -> str:
    """How many, and of how many if there are fewer than asked."""
    if num_asked is not None and num < num_asked:
        return f"{num} of {num_asked} seeds"
    return "one seed" if num == 1 else f"{num} seeds"


def number(value: float | None) -> str:
    """As it was published."""
    return "-" if value is None else f"{value:g}"


def gigabytes(num_bytes: float | None) -> str:
    """10**9 bytes."""
    return "-" if num_bytes is None else f"{num_bytes / 1e9:.2f}"


def megabytes(num_bytes: float | None) -> str:
    """10**6 bytes."""
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.0f}"
