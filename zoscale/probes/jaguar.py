"""JAGUAR's probes: signs on a random support: one coordinate, an entry, a row, a block, whole tensors."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from zoscale.noise import philox
from zoscale.noise.fused import on_device
from zoscale.noise.generator import Domain, Key, Noise, Range, signs_at, stays_bits
from zoscale.noise.kernels import stream_of
from zoscale.noise.segments import Segment
from zoscale.noise.streams import Mask, Stream
from zoscale.probes.base import Direction, DrawnDirection, Patch, Piece, Probe
from zoscale.probes.supports import FUSED_ABOVE, Support, marks_of
from zoscale.shards import TensorSpec

Signs = Literal["rademacher", "ones"]

_DENSE_ABOVE = 1 / 16  # a support with a larger share is cheaper as a dense segment than as an index
_ROWS = 512  # of a patch that are made at a time


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
        supports: dict[int, Support],
        signs: Signs,
    ) -> None:
        super().__init__(noise, step, k)
        self.supports = supports
        self.signs = signs
        self._specs = specs
        self._masks: dict[torch.device, dict[int, Mask]] = {}

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        device = group[0].shard.truth.device
        streams = {piece: stream for piece in group if (stream := self.stream(piece)) is not None}
        made: dict[Piece, Segment | None] = {p: Segment(stream, is_compiled=True) for p, stream in streams.items()}
        drawn = [piece for piece in group if piece not in made and self._reaches(piece)]
        words = self._words([piece.range for piece in drawn], device)
        made |= {piece: self._segment(piece, own, device) for piece, own in zip(drawn, words, strict=True)}
        return [made.get(piece) for piece in group]

    def stream(self, piece: Piece) -> Stream | None:
        spec, device = piece.shard.spec, piece.shard.truth.device
        if spec.id not in self._streamed:
            return None
        mask = partial(self._mask, spec, device)
        return stream_of(self.noise, self.key, piece.range, "rademacher", device, mask)

    @cached_property
    def _streamed(self) -> set[int]:
        """Ids of the tensors whose z kernels may make."""
        if self.signs != "rademacher":
            return set()
        some = ((own.id, self.supports.get(own.id), own) for own in self._specs)
        return {number for number, found, own in some if found is not None and found.share(own) >= FUSED_ABOVE}

    def is_bits(self, piece: Piece) -> bool:
        support = self.supports.get(piece.shard.spec.id)
        return self.is_compiled and stays_bits(piece.range) and (support is None or support.has_words(piece.shard.spec))

    def is_patch(self, spec: TensorSpec) -> bool:
        support = self.supports.get(spec.id)
        return support is not None and spec.columns % philox.BITS == 0 and support.share(spec) <= _DENSE_ABOVE

    def patches(self, specs: Sequence[TensorSpec], device: torch.device) -> list[Patch]:
        words = self._words([Range(spec.id, 0, spec.numel) for spec in specs], device)
        return [self._patch(spec, own.view(spec.rows, -1)) for spec, own in zip(specs, words, strict=True)]

    def _patch(self, spec: TensorSpec, words: Tensor) -> Patch:
        """Of the words of its signs, row by row; some rows at a time: bits take little memory, and signs much."""
        support, device = self.supports[spec.id], words.device
        rows = torch.arange(spec.rows) if support.rows is None else support.rows
        columns = torch.arange(spec.columns) if support.columns is None else support.columns
        rows, columns = on_device(rows, device), on_device(columns, device)
        shifts = (columns % philox.BITS).to(torch.int32)
        values = torch.empty(len(rows), len(columns), device=device)
        for some, out in zip(torch.split(rows, _ROWS), torch.split(values, _ROWS), strict=True):
            bits = words[some].index_select(1, columns // philox.BITS)
            out.copy_(philox.sign(bits.bitwise_right_shift_(shifts).bitwise_and_(1)))
        return Patch(rows, columns, values)

    def _mask(self, spec: TensorSpec, device: torch.device) -> Mask | None:
        """The support of a tensor on its device; those of all tensors are sent there together."""
        if device not in self._masks:
            some = [(own, s) for own in self._specs if (s := self.supports.get(own.id)) is not None and not s.is_whole]
            parts = torch.split(on_device(marks_of(some), device), [own.rows + own.columns for own, _ in some])
            self._masks[device] = {
                own.id: Mask(part, own.rows, own.columns) for (own, _), part in zip(some, parts, strict=True)
            }
        return self._masks[device].get(spec.id)

    def touches(self, spec: TensorSpec) -> bool:
        return spec.id in self.supports

    def _reaches(self, piece: Piece) -> bool:
        """Whether its support has rows of a piece; known without a number of the device."""
        spec, (_, start, stop) = piece.shard.spec, piece.range
        return spec.id in self.supports and bool(self.supports[spec.id].rows_of(spec, start, stop))

    def _words(self, ranges: Sequence[Range], device: torch.device) -> list[Tensor]:
        """See `Noise.sign_words`; without a set bit where all signs are +1, which draws nothing."""
        if self.signs == "rademacher":
            return self.noise.sign_words(self.key, ranges, device)
        spans = [(start // philox.BITS, -(-stop // philox.BITS)) for _, start, stop in ranges]
        return [torch.zeros(last - first, dtype=torch.int32, device=device) for first, last in spans]

    def _segment(self, piece: Piece, words: Tensor, device: torch.device) -> Segment | None:
        """z on a piece, of the words of its signs."""
        spec, wanted = piece.shard.spec, piece.range
        support = self.supports[spec.id]
        if self.is_bits(piece):
            mask = self._mask(spec, device)
            return Segment(words[None] if mask is None else torch.stack([words, mask.bits(wanted)]), is_compiled=True)
        index = support.positions(spec, wanted.start, wanted.stop, device)
        if index is None:
            every = torch.arange(wanted.stop - wanted.start, device=device)
            return Segment(signs_at(words, wanted, every), is_compiled=self.is_compiled)
        signs = signs_at(words, wanted, index)
        if index.numel() <= _DENSE_ABOVE * (wanted.stop - wanted.start):
            return Segment(signs, index) if index.numel() else None
        value = torch.zeros(wanted.stop - wanted.start, device=device)
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
    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, Support]:
        """The support of each perturbed tensor, by id."""


def _one_entry(spec: TensorSpec, position: int) -> Support:
    row, column = divmod(position, spec.columns)
    return Support(torch.tensor([row]), torch.tensor([column]))


class Coordinate(JaguarProbe):
    """One coordinate of all trainable elements (arXiv 2506.04430, Algorithm 1).

    Args:
        signs: `rademacher` or `ones`.
    """

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, Support]:
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

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, Support]:
        positions = noise.integers(Key(step, k, Domain.SUPPORT), [(spec.id, spec.numel) for spec in specs])
        return {spec.id: _one_entry(spec, position) for spec, position in zip(specs, positions, strict=True)}


class Row(JaguarProbe):
    """One row of every matrix and one entry of every vector.

    Args:
        signs: `rademacher` or `ones`.
    """

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, Support]:
        wanted = [(spec.id, spec.rows if spec.is_matrix else spec.columns, 1) for spec in specs]
        drawn = noise.choices(Key(step, k, Domain.SUPPORT), wanted)
        return {
            spec.id: Support(chosen, None) if spec.is_matrix else Support(None, chosen)
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

    def __init__(self, *, rows: float = 0.5, columns: float = 0.5, signs: Signs = "rademacher") -> None:
        super().__init__(signs=signs)
        self.rows = check_share("rows", rows)
        self.columns = check_share("columns", columns)

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, Support]:
        matrices = [spec for spec in specs if spec.is_matrix]
        rows = [(spec.id, spec.rows, portion(self.rows, spec.rows)) for spec in matrices]
        columns = [(spec.id, spec.columns, portion(self.columns, spec.columns)) for spec in specs]
        drawn_rows = noise.choices(Key(step, k, Domain.SUPPORT), rows) if rows else []
        chosen_rows = dict(zip((spec.id for spec in matrices), drawn_rows, strict=True))
        drawn_columns = noise.choices(Key(step, k, Domain.SUPPORT_COLUMNS), columns)
        return {
            spec.id: Support(chosen_rows.get(spec.id), chosen)
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

    def supports(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> dict[int, Support]:
        count = portion(self.share, len(specs))
        (chosen,) = noise.choices(Key(step, k, Domain.SUPPORT), [(0, len(specs), count)])
        return {specs[index].id: Support(None, None) for index in chosen.tolist()}


def check_share(name: str, value: float) -> float:
    """The value, if it is a share.

    Raises:
        ValueError: if it is not in (0, 1].
    """
    if not 0 < value <= 1:
        raise ValueError(f"expected {name} in (0, 1], got {value}")
    return value


def portion(share: float, n: int) -> int:
    """floor(share * n), at least 1; what rounding alone keeps below a whole number, as 0.29 * 100, is that number."""
    return max(1, math.floor(share * n + 1e-9))
