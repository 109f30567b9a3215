"""Scratch copies: the values that gathered weights have for each candidate, one candidate after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zoscale.estimators import Candidate
from zoscale.grouping import alike, filled
from zoscale.noise.kernels import kernels_on
from zoscale.noise.segments import Segment, Write, values, write_all
from zoscale.noise.streams import ALIGNED
from zoscale.probes import Direction, Patch, Piece, pieces
from zoscale.shards import ShardedParam, TensorSpec, chunk

_SMALL = 2**16  # elements of a slab that is drawn together with others
_TOGETHER = 2**18  # of those that are drawn together, and kept until they are used
_PATCHED = 2**24  # elements of the tensors whose patches are
_CPU = torch.device("cpu")  # where patches are of use


@dataclass(frozen=True)
class Drawn:
    """z on a part of a slab, one direction after the other.

    Args:
        start: first element within the slab.
        segment: z of the direction of this number; None = it is zero.
    """

    start: int
    segment: Callable[[int], Segment | None]


class Draws:
    """The noise of one pass over gathered weights; small slabs are drawn together and kept until they are used.

    Where kernels make z in registers and weights are whole, launches are what a step of a small model takes: as many
    slabs are written together as have room for all candidates in one chunk, and kept likewise.

    Args:
        candidates: of the pass.
        outlines: the slabs that will be asked for, each once, about in this order.
        patched: the tensors whose patches will be asked for, likewise.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        outlines: Sequence[ShardedParam],
        patched: Sequence[TensorSpec] = (),
    ) -> None:
        self._directions, self._numbers = _by_direction(candidates)
        self._groups: dict[Piece, list[Piece]] = {}
        self._pieces: dict[int, list[Piece]] = {}
        for group in self._drawn_together(outlines):
            for piece in group:
                self._groups[piece] = group
                self._pieces.setdefault(id(piece.shard), []).append(piece)
        self._batches = {id(outline): batch for batch in self._batched(outlines) for outline in batch.outlines}
        self._kept: dict[tuple[int, Piece], Segment | None] = {}
        self._neighbours = _neighbours(patched, _PATCHED // max(1, len(self._directions)))
        self._patches: dict[tuple[int, TensorSpec], Patch] = {}

    def _drawn_together(self, outlines: Sequence[ShardedParam]) -> Iterator[list[Piece]]:
        small, packed, large = list[ShardedParam](), list[ShardedParam](), list[ShardedParam]()
        for outline in outlines:
            is_bits = self._is_bits(Piece(outline, 0, len(outline)))
            (small if len(outline) <= _SMALL else packed if is_bits else large).append(outline)
        yield from pieces(small, _TOGETHER)
        yield from pieces(packed, 2 * _TOGETHER, is_bits=self._is_bits)
        for outline in large:
            yield from ([piece] for group in pieces([outline]) for piece in group)

    def _batched(self, outlines: Sequence[ShardedParam]) -> Iterator["_Batch"]:
        """Slabs that follow one another, a chunk of their device for all candidates together."""
        count = max(1, sum(map(len, self._numbers.values())))
        for numbers in alike((outline.truth.device, outline.param.dtype) for outline in outlines):
            device = outlines[numbers[0]].truth.device
            limit = chunk(device) // count
            some = [outlines[number] for number in numbers if kernels_on(device) is not None]
            fitting = (outline for outline in some if len(outline) <= limit and outline.is_whole)
            yield from map(_Batch, filled(fitting, len, limit))

    def written(self, outlines: Sequence[ShardedParam]) -> list[dict[int, Tensor]]:
        """Of each slab, by number the values of every candidate but the point itself: in a launch per candidate."""
        bases = [outline.values for outline in outlines]
        sizes = [-(-len(base) // ALIGNED) * ALIGNED for base in bases]
        found: list[dict[int, Tensor]] = [{} for _ in bases]
        for place in range(len(self._directions)):
            drawn = [[(part.start, part.segment(place)) for part in self.of(outline)] for outline in outlines]
            for number, radius in self._numbers[place]:
                writes = list[Write]()
                parts = torch.split(bases[0].new_empty(sum(sizes)), sizes)
                for own, part, base, segments in zip(found, parts, bases, drawn, strict=True):
                    own[number] = part[: len(base)]
                    if not _is_dense(segments):
                        own[number].copy_(base)
                    writes += [Write(z, own[number], base, start) for start, z in segments if z is not None]
                write_all(writes, radius)
        return found

    def _is_bits(self, piece: Piece) -> bool:
        return all(direction.is_bits(piece) for direction in self._directions)

    def of(self, outline: ShardedParam) -> list[Drawn]:
        """The noise of one slab."""
        return [Drawn(piece.start, partial(self._take, piece)) for piece in self._pieces[id(outline)]]

    def at(self, outlines: Sequence[ShardedParam]) -> list[Drawn]:
        """The noise of slabs that lie one after the other in one table."""
        drawn, start = [], 0
        for group in pieces(outlines):
            drawn.append(Drawn(start, partial(self._joined, group)))
            start += sum(piece.stop - piece.start for piece in group)
        return drawn

    def values(self, slabs: Sequence[tuple[Tensor, ShardedParam]]) -> Iterator[tuple[int, list[Tensor]]]:
        """What each candidate's weights are.

        Args:
            slabs: the gathered values (1-D; only read) and their outlines.

        Yields:
            The candidate's number and its values, which are valid until the next one is asked for.
        """
        if any(id(outline) not in self._batches for _, outline in slabs):
            yield from self.scratch([(base, self.of(outline)) for base, outline in slabs])
            return
        for number, _ in self._numbers.get(None, ()):
            yield number, [base for base, _ in slabs]
        written = [self._batches[id(outline)].take(outline, self) for _, outline in slabs]
        for place in range(len(self._directions)):
            for number, _ in self._numbers[place]:
                yield number, [values[number] for values in written]

    def scratch(self, slabs: Sequence[tuple[Tensor, Sequence[Drawn]]]) -> Iterator[tuple[int, list[Tensor]]]:
        """`values` of slabs with their noise, each on one scratch copy."""
        for number, _ in self._numbers.get(None, ()):
            yield number, [base for base, _ in slabs]
        works = [_Work(base, drawn) for base, drawn in slabs]
        for place in range(len(self._directions)):
            for work in works:
                work.turn_to(place)
            for number, radius in self._numbers[place]:
                for work in works:
                    work.write(radius)
                yield number, [work.values for work in works]

    def patches(self, spec: TensorSpec) -> Iterator[tuple[Patch, list[tuple[int, float]]]]:
        """Of each direction that touches a tensor: z, and the numbers and radii of its candidates."""
        for place, direction in enumerate(self._directions):
            if direction.touches(spec):
                if (place, spec) not in self._patches:
                    group = [own for own in self._neighbours[spec] if direction.touches(own)]
                    self._patches |= {(place, o): z for o, z in zip(group, direction.patches(group, _CPU), strict=True)}
                yield self._patches.pop((place, spec)), self._numbers[place]

    def _take(self, piece: Piece, place: int) -> Segment | None:
        if (place, piece) not in self._kept:
            group = self._groups[piece]
            drawn = self._directions[place].segments(group)
            self._kept |= {(place, own): segment for own, segment in zip(group, drawn, strict=True)}
        return self._kept.pop((place, piece))

    def _joined(self, group: Sequence[Piece], place: int) -> Segment | None:
        return _joined(group, self._directions[place].segments(group))


class _Batch:
    """Slabs whose values are written together, when the first of them is asked for.

    Args:
        outlines: the slabs.
    """

    def __init__(self, outlines: Sequence[ShardedParam]) -> None:
        self.outlines = outlines
        self._written: dict[int, dict[int, Tensor]] = {}

    def take(self, outline: ShardedParam, draws: Draws) -> dict[int, Tensor]:
        """The values of a slab by number of the candidate; each once."""
        if not self._written:
            self._written = {
                id(own): values for own, values in zip(self.outlines, draws.written(self.outlines), strict=True)
            }
        return self._written.pop(id(outline))


class _Work:
    """A scratch copy of one slab.

    Args:
        base: the slab's values; only read.
        drawn: its noise.
    """

    def __init__(self, base: Tensor, drawn: Sequence[Drawn]) -> None:
        self.values = torch.empty_like(base)
        self._base = base
        self._drawn = drawn
        self._segments: list[tuple[int, Segment]] = []
        self._is_base = False

    def turn_to(self, place: int) -> None:
        """Draw a direction; what it leaves as it is has the slab's values from here on."""
        if self._is_base:  # but for what the last one wrote
            self.write(0.0)
        self._segments.clear()  # before the next is drawn
        found = [(part.start, part.segment(place)) for part in self._drawn]
        self._segments = [(start, segment) for start, segment in found if segment is not None]
        is_dense = _is_dense(found)
        if not (is_dense or self._is_base):
            self.values.copy_(self._base)
        self._is_base = not is_dense

    def write(self, radius: float) -> None:
        """The values at one radius."""
        for start, segment in self._segments:
            segment.write(self.values, self._base, start, radius)


def _is_dense(segments: Sequence[tuple[int, Segment | None]]) -> bool:
    """Whether they write every element."""
    return all(segment is not None and segment.index is None for _, segment in segments)


def _neighbours(specs: Sequence[TensorSpec], limit: int) -> dict[TensorSpec, list[TensorSpec]]:
    """Of each tensor, those that follow one another and have at most `limit` elements, or itself."""
    groups = filled(specs, lambda spec: spec.numel, limit)
    return {spec: group for group in groups for spec in group}


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
