"""Scratch copies: the values that gathered weights have for each candidate, one candidate after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoscale.estimators import Candidate
from zoscale.probes import Direction, Piece, pieces
from zoscale.segments import Segment, values
from zoscale.shards import ShardedParam


@dataclass(frozen=True)
class Drawn:
    """z of every direction on a part of a slab.

    Args:
        start: first element within the slab.
        segments: one per direction.
    """

    start: int
    segments: Sequence[Segment | None]


class Draws:
    """The noise of one pass over gathered weights; many small slabs are drawn at once and kept until they are used.

    Args:
        candidates: of the pass.
        outlines: the slabs that will be asked for, about in this order.
    """

    def __init__(self, candidates: Sequence[Candidate], outlines: Sequence[ShardedParam]) -> None:
        self.num_candidates = len(candidates)
        self._directions, self._numbers = _by_direction(candidates)
        self._groups = list(pieces(outlines))
        self._places: dict[int, list[int]] = {}
        for place, group in enumerate(self._groups):
            for shard in {id(piece.shard): None for piece in group}:
                self._places.setdefault(shard, []).append(place)
        self._kept: dict[tuple[int, int], Drawn] = {}

    def of(self, outline: ShardedParam) -> list[Drawn]:
        """The noise of one slab."""
        drawn = []
        for place in self._places[id(outline)]:
            for piece in self._groups[place]:
                if piece.shard is outline:
                    if (id(outline), piece.start) not in self._kept:
                        self._draw(self._groups[place])
                    drawn.append(self._kept.pop((id(outline), piece.start)))
        return drawn

    def at(self, outlines: Sequence[ShardedParam]) -> list[Drawn]:
        """The noise of slabs that lie one after the other in one table."""
        drawn, start = [], 0
        for group in pieces(outlines):
            segments = [_joined(group, direction.segments(group)) for direction in self._directions]
            drawn.append(Drawn(start, segments))
            start += sum(piece.stop - piece.start for piece in group)
        return drawn

    def values(self, slabs: Sequence[tuple[Tensor, Sequence[Drawn]]]) -> Iterator[tuple[int, list[Tensor]]]:
        """What each candidate's weights are.

        Args:
            slabs: the gathered values (1-D; only read) and their noise.

        Yields:
            The candidate's number and its values, which are valid until the next one is asked for.
        """
        for number, _ in self._numbers.get(None, ()):
            yield number, [base for base, _ in slabs]
        is_whole = [_covers(drawn) for _, drawn in slabs]
        works = [torch.empty_like(b) if whole else b.clone() for whole, (b, _) in zip(is_whole, slabs, strict=True)]
        for place in range(len(self._directions)):
            for number, radius in self._numbers[place]:
                for work, (base, drawn) in zip(works, slabs, strict=True):
                    _write(work, base, drawn, place, radius)
                yield number, works
            if place + 1 < len(self._directions):
                for work, whole, (base, drawn) in zip(works, is_whole, slabs, strict=True):
                    if not whole:
                        _write(work, base, drawn, place, 0.0)

    def _draw(self, group: Sequence[Piece]) -> None:
        by_direction = [direction.segments(group) for direction in self._directions]
        for piece, *segments in zip(group, *by_direction, strict=True):
            self._kept[id(piece.shard), piece.start] = Drawn(piece.start, segments)


def _by_direction(candidates: Sequence[Candidate]) -> tuple[list[Direction], dict[int | None, list[tuple[int, float]]]]:
    """The distinct directions, and by direction (None: the point itself) the numbers and radii of its candidates."""
    directions: list[Direction] = []
    numbers: dict[int | None, list[tuple[int, float]]] = {}
    for number, candidate in enumerate(candidates):
        place = None
        if candidate.direction is not None:
            known = [i for i, direction in enumerate(directions) if direction is candidate.direction]
            if not known:
                directions.append(candidate.direction)
            place = known[0] if known else len(directions) - 1
        numbers.setdefault(place, []).append((number, candidate.radius))
    return directions, numbers


def _covers(drawn: Sequence[Drawn]) -> bool:
    """Whether every direction has a value for every element, so that none of another one's is left over."""
    return all(segment is not None and segment.index is None for part in drawn for segment in part.segments)


def _write(work: Tensor, base: Tensor, drawn: Sequence[Drawn], place: int, radius: float) -> None:
    for part in drawn:
        segment = part.segments[place]
        if segment is not None:
            segment.write(work, base, part.start, radius)


def _joined(group: Sequence[Piece], segments: Sequence[Segment | None]) -> Segment | None:
    """One segment over pieces that lie one after the other."""
    found = [segment for segment in segments if segment is not None]
    if not found:
        return None
    z = values(found)
    if all(segment is not None and segment.index is None for segment in segments):
        return Segment(torch.cat(z), is_compiled=all(segment.is_compiled for segment in found))
    start, index, made = 0, [], iter(z)
    for piece, segment in zip(group, segments, strict=True):
        if segment is not None:
            own = next(made)
            here = torch.arange(len(own), device=own.device) if segment.index is None else segment.index
            index.append(here + start)
        start += piece.stop - piece.start
    return Segment(torch.cat(z), torch.cat(index))
