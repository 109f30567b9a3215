"""Things that are handled together: those that are alike, and as many as fit."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def alike(kinds: Iterable[Hashable]) -> list[list[int]]:
    """The numbers of those that are equal, together."""
    found: dict[Hashable, list[int]] = {}
    for number, kind in enumerate(kinds):
        found.setdefault(kind, []).append(number)
    return list(found.values())


def filled(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Items that follow one another, as many as have room; a larger one is alone."""
    group: list[T] = []
    total = 0
    for item in items:
        own = size(item)
        if group and total + own > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += own
    if group:
        yield group


def balanced(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The numbers of items in so many groups of nearly equal sums: the largest first, each to the smallest group."""
    groups: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        place = sums.index(min(sums))
        groups[place].append(number)
        sums[place] += sizes[number]
    return groups
