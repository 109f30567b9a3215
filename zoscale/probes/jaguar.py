"""JAGUAR's probes: signs on a random support: one coordinate, an entry, a row, a block, whole tensors."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from zoscale.fused import on_device
from zoscale.noise import Domain, Key, Noise
from zoscale.probes.base import Direction, DrawnDirection, Piece, Probe
from zoscale.segments import Segment
from zoscale.shards import TensorSpec
from zoscale.streams import Mask, Stream, stream_of

Signs = Literal["rademacher", "ones"]

_DENSE_ABOVE = 1 / 16  # a support with a larger share is cheaper as a dense segment than as an index
_STREAM_ABOVE = 1 / 256  # and where kernels make z in registers, as one pass over the tensor


@dataclass(frozen=True)
class _Support:
    """Rows x columns of one tensor, sorted int64 on the CPU; None = all of them."""

    rows: Tensor | None
    columns: Tensor | None

    @property
    def is_whole(self) -> bool:
        """Whether it is every element."""
        return self.rows is None and self.columns is None

    def share(self, spec: TensorSpec) -> float:
        """Of the elements of the tensor."""
        rows = 1.0 if self.rows is None else len(self.rows) / spec.rows
        return rows if self.columns is None else rows * len(self.columns) / spec.columns

    def marks(self, spec: TensorSpec) -> Tensor:
        """See `Mask`; on the CPU."""
        marks = torch.zeros(spec.rows + spec.columns, dtype=torch.uint8)
        marks[slice(0, spec.rows) if self.rows is None else self.rows] = 1
        marks[slice(spec.rows, None) if self.columns is None else self.columns + spec.rows] = 1
        return marks

    def positions(self, spec: TensorSpec, first: int, last: int, device: torch.device) -> Tensor | None:
        """Flat positions of the support in [first, last) of the tensor, relative to first; None = all of them.

        Made on the device, of the few rows and columns, and counted on the CPU: nobody waits.
        """
        if self.is_whole:
            return None
        width = spec.columns
        low, high = first // width, -(-last // width)
        rows = torch.arange(low, high) if self.rows is None else self.rows
        rows = rows[torch.searchsorted(rows, low) : torch.searchsorted(rows, high)]
        columns = torch.arange(width) if self.columns is None else self.columns
        begin, end = (_count_before(position, rows, columns, width) for position in (first, last))
        flat = (on_device(rows, device)[:, None] * width + on_device(columns, device)).view(-1)
        return flat[begin:end] - first


def _count_before(position: int, rows: Tensor, columns: Tensor, width: int) -> int:
    """How many of rows x columns lie before a flat position."""
    row, column = divmod(position, width)
    above = int(torch.searchsorted(rows, row))
    is_within = above < len(rows) and int(rows[above]) == row
    return above * len(columns) + (int(torch.searchsorted(columns, column)) if is_within else 0)


class JaguarDirection(DrawnDirection):
    """Signs on a support of rows x columns per tensor; a tensor without a support is not perturbed.

    Args:
        specs: of all tensors.
        supports: by tensor id.
        signs: +1 or -1 at random (unbiased), or all +1 (the paper's code).
    """

    def __init__(
        self,
        noise: Noise,
        step: int,
        k: int,
        specs: Sequence[TensorSpec],
        supports: dict[int, _Support],
        signs: Signs,
    ) -> None:
        super().__init__(noise, step, k)
        self.supports = supports
        self.signs = signs
        self._specs = specs
        self._masks: dict[torch.device, dict[int, Mask]] = {}

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        device = group[0].shard.truth.device
        found: dict[Piece, Tensor | None] = {}
        streams = {piece: stream for piece in group if (stream := self.stream(piece)) is not None}
        for piece in group:
            support = self.supports.get(piece.shard.spec.id)
            if support is not None and piece not in streams:
                index = support.positions(piece.shard.spec, piece.range.start, piece.range.stop, device)
                if index is None or index.numel():
                    found[piece] = index
        signs = dict(zip(found, self._signs(found, device), strict=True))
        made = {piece: self._segment(piece, index, signs[piece]) for piece, index in found.items()}
        made |= {piece: Segment(stream, is_compiled=True) for piece, stream in streams.items()}
        return [made.get(piece) for piece in group]

    def stream(self, piece: Piece) -> Stream | None:
        spec, device = piece.shard.spec, piece.shard.truth.device
        support = self.supports.get(spec.id)
        if self.signs != "rademacher" or support is None or support.share(spec) < _STREAM_ABOVE:
            return None
        mask = partial(self._mask, spec, device)
        return stream_of(self.noise, self.key, piece.range, "rademacher", device, mask)

    def _mask(self, spec: TensorSpec, device: torch.device) -> Mask | None:
        """The support of a tensor on its device; those of all tensors are sent there together."""
        if device not in self._masks:
            some = [(own, s) for own in self._specs if (s := self.supports.get(own.id)) is not None and not s.is_whole]
            marks = on_device(torch.cat([s.marks(own) for own, s in some]), device) if some else torch.empty(0)
            parts = torch.split(marks, [own.rows + own.columns for own, _ in some])
            self._masks[device] = {
                own.id: Mask(part, own.rows, own.columns) for (own, _), part in zip(some, parts, strict=True)
            }
        return self._masks[device].get(spec.id)

    def touches(self, spec: TensorSpec) -> bool:
        return spec.id in self.supports

    def _signs(self, found: Mapping[Piece, Tensor | None], device: torch.device) -> list[Tensor]:
        every = [torch.arange(p.stop - p.start, device=device) if i is None else i for p, i in found.items()]
        if self.signs == "ones":
            return [torch.ones(index.numel(), device=device) for index in every]
        return self.noise.rademacher_at(self.key, [piece.range for piece in found], every, device)

    def _segment(self, piece: Piece, index: Tensor | None, signs: Tensor) -> Segment:
        if index is None:
            return Segment(signs, is_compiled=self.is_compiled)
        size = piece.stop - piece.start
        if index.numel() <= _DENSE_ABOVE * size:
            return Segment(signs, index)
        value = torch.zeros(size, device=signs.device)
        value[index] = signs
        return Segment(value, is_compiled=self.is_compiled)


class JaguarProbe(Probe):
    """Signs on a random support.

    Args:
        signs: `rademacher` (unbiased estimate of the partial derivatives), or `ones` as in the code of arXiv
            2506.04430, where each visited coordinate receives the sum of the derivatives over the support.
    """

    def __init__(self, *, signs: Signs = "rademacher") -> None:
        self.signs = signs

    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> Direction:
        return JaguarDirection(noise, step, k, specs, self.supports(noise, specs, step, k), self.signs)

    @abstractmethod
    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, _Support]:
        """The support of each perturbed tensor, by id."""


def _one_entry(spec: TensorSpec, position: int) -> _Support:
    row, column = divmod(position, spec.columns)
    return _Support(torch.tensor([row]), torch.tensor([column]))


class Coordinate(JaguarProbe):
    """One coordinate of all trainable elements (arXiv 2506.04430, Algorithm 1).

    Args:
        signs: `rademacher` or `ones`.
    """

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, _Support]:
        (position,) = noise.integers(Key(step, k, Domain.SUPPORT), [(0, sum(spec.numel for spec in specs))])
        for spec in specs:
            if position < spec.numel:
                return {spec.id: _one_entry(spec, position)}
            position -= spec.numel
        raise AssertionError("a drawn position lies outside all tensors")


class Entry(JaguarProbe):
    """One entry (i, j) of every tensor (arXiv 2506.04430, Algorithm 2).

    Args:
        signs: `rademacher` or `ones`.
    """

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, _Support]:
        positions = noise.integers(Key(step, k, Domain.SUPPORT), [(spec.id, spec.numel) for spec in specs])
        return {spec.id: _one_entry(spec, position) for spec, position in zip(specs, positions, strict=True)}


class Row(JaguarProbe):
    """One row of every matrix and one entry of every vector.

    Args:
        signs: `rademacher` or `ones`.
    """

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, _Support]:
        wanted = [(spec.id, spec.rows if spec.is_matrix else spec.columns, 1) for spec in specs]
        drawn = noise.choices(Key(step, k, Domain.SUPPORT), wanted)
        return {
            spec.id: _Support(chosen, None) if spec.is_matrix else _Support(None, chosen)
            for spec, chosen in zip(specs, drawn, strict=True)
        }


class Block(JaguarProbe):
    """A block of every tensor at once: max(1, floor(rows * m)) rows x max(1, floor(columns * n)) columns.

    Rows and columns are drawn without replacement; of a vector, max(1, floor(columns * n)) entries.

    Args:
        rows: share of the rows, in (0, 1].
        columns: share of the columns, in (0, 1].
        signs: `rademacher` or `ones`.
    """

    def __init__(self, *, rows: float = 0.1, columns: float = 0.1, signs: Signs = "rademacher") -> None:
        super().__init__(signs=signs)
        self.rows = check_share("rows", rows)
        self.columns = check_share("columns", columns)

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, _Support]:
        matrices = [spec for spec in specs if spec.is_matrix]
        rows = [(spec.id, spec.rows, portion(self.rows, spec.rows)) for spec in matrices]
        columns = [(spec.id, spec.columns, portion(self.columns, spec.columns)) for spec in specs]
        drawn_rows = noise.choices(Key(step, k, Domain.SUPPORT), rows) if rows else []
        chosen_rows = dict(zip((spec.id for spec in matrices), drawn_rows, strict=True))
        drawn_columns = noise.choices(Key(step, k, Domain.SUPPORT_COLUMNS), columns)
        return {
            spec.id: _Support(chosen_rows.get(spec.id), chosen)
            for spec, chosen in zip(specs, drawn_columns, strict=True)
        }


class Tensors(JaguarProbe):
    """All entries of a random subset of the tensors: max(1, floor(share * number of tensors)) of them.

    Args:
        share: share of the tensors, in (0, 1].
        signs: `rademacher` or `ones`.
    """

    def __init__(self, *, share: float = 0.25, signs: Signs = "rademacher") -> None:
        super().__init__(signs=signs)
        self.share = check_share("share", share)

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, _Support]:
        count = portion(self.share, len(specs))
        (chosen,) = noise.choices(Key(step, k, Domain.SUPPORT), [(0, len(specs), count)])
        return {specs[index].id: _Support(None, None) for index in chosen.tolist()}


def check_share(name: str, value: float) -> float:
    """The value, if it is a share.

    Raises:
        ValueError: if it is not in (0, 1].
    """
    if not 0 < value <= 1:
        raise ValueError(f"expected {name} in (0, 1], got {value}")
    return value


def portion(share: float, n: int) -> int:
    """That share of n, at least 1."""
    return max(1, int(share * n))
