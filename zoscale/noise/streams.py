"""`Stream`: z on a part of a tensor as its coordinates, for kernels that make it in registers.

Only where Triton's kernels run: on a GPU, or on the CPU in Triton's interpreter (`TRITON_INTERPRET=1`, for tests).
Elsewhere z is drawn to memory by `generator.py`, which measures no slower on a CPU: there the arithmetic of the
generator costs, not the memory traffic.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import floordiv, sub
from typing import Any, Literal

import torch
from torch import Tensor

from zoscale.grouping import alike
from zoscale.noise import philox
from zoscale.noise.fused import on_device
from zoscale.noise.generator import Key, Noise, Range

Distribution = Literal["normal", "rademacher"]
ALIGNED = 16
"""Elements that a kernel takes at once, at most, and bytes that their addresses are multiples of then."""
MANY = 4
"""Tensors from which one launch is cheaper, even if where they lie must be sent to the device."""


@dataclass(frozen=True)
class Mask:
    """Rows x columns of one tensor, outside of which z is zero.

    Args:
        marks: uint8 [rows + columns] on the device: 1 for the rows and the columns that it has.
        rows, columns: of the tensor.
    """

    marks: Tensor
    rows: int
    columns: int

    def on(self, wanted: Range) -> Tensor:
        """Whether each of these elements is in it: bool."""
        place = torch.arange(wanted.start, wanted.stop, device=self.marks.device)
        marks = self.marks.bool()
        return marks[place // self.columns] & marks[place % self.columns + self.rows]

    def bits(self, wanted: Range) -> Tensor:
        """`on` as words: int32 [n / 32]. The range is of whole words, and so are the tensor's rows."""
        rows, columns = self._words
        first, last = wanted.start // philox.BITS, wanted.stop // philox.BITS
        low, high = first // len(columns), -(-last // len(columns))
        words = (rows[low:high, None] & columns).view(-1)
        return words[first - low * len(columns) : last - low * len(columns)]

    @functools.cached_property
    def _words(self) -> tuple[Tensor, Tensor]:
        """All bits or none, by row; and those of a row."""
        rows, columns = self.marks[: self.rows], self.marks[self.rows :]
        return -rows.to(torch.int32), philox.packed(columns)


@dataclass(frozen=True)
class Stream:
    """z of one direction on elements of one tensor.

    Args:
        noise: whose numbers they are.
        key: step and direction.
        range: the elements.
        distribution: of z.
        device: of the slices that it is used on.
        kernels: `triton_kernels`.
        mask: where z is not zero; None = everywhere.
    """

    noise: Noise
    key: Key
    range: Range
    distribution: Distribution
    device: torch.device
    kernels: Any
    mask: Mask | None = None

    def __len__(self) -> int:
        return self.range.stop - self.range.start

    @property
    def kind(self) -> tuple[Any, ...]:
        """Streams of one kind may be used together."""
        return id(self.noise), self.key, self.distribution, self.mask is None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the mask."""
        return (self.mask.rows, self.mask.columns) if self.mask is not None else (0, 0)


Slices = tuple[Tensor | None, ...]
"""Of one stream's length each."""


def perturb_all(streams: Sequence[Stream], slices: Sequence[Slices], radius: float) -> None:
    """`fused.perturb` of many tensors, a launch for all streams of one kind.

    Args:
        streams: of one direction.
        slices: of each, `out` and `base`.
        radius: signed smoothing radius.
    """
    for numbers in alike(stream.kind for stream in streams):
        some = [streams[number] for number in numbers]
        rest = (counter_word(some[0].key), radius)
        launch("perturb", [[stream] for stream in some], [slices[number] for number in numbers], rest)


def launch(name: str, streams: Sequence[Sequence[Stream]], slices: Sequence[Slices], rest: Sequence[Any]) -> None:
    """Run a kernel, once for all tensors whose slices have the same types if they are many.

    Args:
        name: of the kernel.
        streams: of each tensor, one per direction.
        slices: of each tensor, the first arguments.
        rest: the last ones.
    """
    for numbers in alike(tuple(part if part is None else part.dtype for part in parts) for parts in slices):
        found = [(streams[number], slices[number]) for number in numbers if len(streams[number][0])]
        size = len(found) if len(found) >= MANY else 1
        for first in range(0, len(found), size):
            _launch_alike(name, found[first : first + size], rest)


def _launch_alike(name: str, found: Sequence[tuple[Sequence[Stream], Slices]], rest: Sequence[Any]) -> None:
    """One launch for tensors whose slices have the same types."""
    streams = [own for own, _ in found]
    marks, begins = _marks(streams)
    first, slices = streams[0][0], found[0][1]
    kernels, seed = first.kernels, first.noise.seed
    sizes, starts = (kernels.UNIT, kernels.SIZE, kernels.SLICES), _addresses(slices)
    programs, is_aligned, place = _placed(sizes, (first.range, first.shape, begins[0], *starts))
    table = owners = None
    if len(found) > 1:
        rows = tuple(
            (own[0].range, own[0].shape, begin, *map(sub, _addresses(parts), starts))
            for (own, parts), begin in zip(found, begins, strict=True)
        )
        widths = tuple(1 if part is None else part.element_size() for part in slices)
        programs, are_aligned, table, owners = _tabled(sizes, rows, widths, first.device)
        is_aligned = is_aligned and are_aligned
    words = map(philox.signed, (first.key.step, seed & 0xFFFFFFFF, seed >> 32))
    stride = 0 if marks is None else marks.shape[1]
    arguments = (*slices, table, owners, *place[:4], *words, marks, stride, *place[4:], *rest)
    variant = {"NORMAL": first.distribution == "normal", "ALIGNED": is_aligned}
    with torch.cuda.device_of(slices[0]):  # type: ignore[no-untyped-call]
        getattr(kernels, name)[programs,](*arguments, **variant, enable_fp_fusion=False)


Sizes = tuple[int, int, int]
"""UNIT, SIZE and SLICES of the kernels."""
Row = tuple[Any, ...]
"""Of a tensor the range, rows and columns, where its marks begin, and the addresses of its slices, or those in bytes
after the first tensor's: the same step after step, wherever scratch copies lie."""


def _addresses(slices: Slices) -> list[int]:
    return [0 if part is None else part.data_ptr() for part in slices]


def _placed(sizes: Sizes, row: Row) -> tuple[int, bool, tuple[int, ...]]:
    """Programs for a tensor, whether it is aligned, and its place as the kernels have it."""
    (unit, size, _), ((tensor, start, stop), (rows, columns), mark, *addresses) = sizes, row
    first, skip = divmod(start, unit)
    row_and_column = divmod(start, columns) if columns else (0, 0)
    n = stop - start
    is_aligned = not any(number % ALIGNED for number in (n, skip, *addresses))
    return (
        -(-(skip + n) // size),
        is_aligned,
        (n, skip, first, philox.signed(tensor), mark, rows, columns, *row_and_column),
    )


@functools.lru_cache(maxsize=512)
def _tabled(
    sizes: Sizes, rows: tuple[Row, ...], widths: tuple[int, ...], device: torch.device
) -> tuple[int, bool, Tensor, Tensor]:
    """Programs for all tensors, whether all are aligned, and `table` and `owners`; `widths`: bytes of an element."""
    placed = [_placed(sizes, row) for row in rows]
    counts = [programs for programs, _, _ in placed]
    table = [
        (*map(floordiv, row[3:], widths), *(0,) * (sizes[2] - len(widths)), start, *place)
        for row, start, (_, _, place) in zip(rows, accumulate(counts[:-1], initial=0), placed, strict=True)
    ]
    owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    is_aligned = all(own for _, own, _ in placed)
    return sum(counts), is_aligned, on_device(torch.tensor(table), device), on_device(owners, device)


def _marks(streams: Sequence[Sequence[Stream]]) -> tuple[Tensor | None, list[int]]:
    """Those of the masks: uint8 [q, stride], None if z is zero nowhere; and where each tensor's begin."""
    if streams[0][0].mask is None:
        return None, [0] * len(streams)
    marks = [stream.mask.marks for own in zip(*streams, strict=True) for stream in own if stream.mask is not None]
    begins = accumulate(map(len, marks[: len(streams) - 1]), initial=0)
    whole = marks[0] if len(marks) == 1 else torch.cat(marks)
    return whole.view(len(streams[0]), -1), list(begins)


def counter_word(key: Key) -> int:
    return philox.signed(key.direction | key.domain << 24)


def drawn(streams: Sequence[Stream]) -> list[Tensor]:
    """The values of streams of one direction, in one pass of the generator: float32 each."""
    if not streams:
        return []
    first = streams[0]
    draw = first.noise.normal if first.distribution == "normal" else first.noise.rademacher
    values = draw(first.key, [stream.range for stream in streams], first.device)
    masks = [None if stream.mask is None else stream.mask.on(stream.range) for stream in streams]
    return [z if mask is None else torch.where(mask, z, 0.0) for z, mask in zip(values, masks, strict=True)]
