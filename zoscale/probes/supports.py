"""`Support`: the rows and columns of a tensor that a direction is not zero on."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from zoscale.noise import philox
from zoscale.noise.fused import on_device
from zoscale.shards import TensorSpec

FUSED_ABOVE = 1 / 256
"""Share of the elements from which a pass over the whole tensor is cheaper than an index, where z is made in it."""


@dataclass(frozen=True)
class Support:
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

    def positions(self, spec: TensorSpec, first: int, last: int, device: torch.device) -> Tensor | None:
        """Flat positions of the support in [first, last) of the tensor, relative to first; None = all of them.

        Made on the device, of the few rows and columns, and counted on the CPU: nobody waits.
        """
        if self.is_whole:
            return None
        width = spec.columns
        rows = self.rows_of(spec, first, last)
        columns = range(width) if self.columns is None else self._column_numbers
        begin, end = (_count_before(position, rows, columns, width) for position in (first, last))
        of_rows = on_device(torch.tensor(rows, dtype=torch.int64), device)
        of_columns = torch.arange(width, device=device) if self.columns is None else on_device(self.columns, device)
        return (of_rows[:, None] * width + of_columns).view(-1)[begin:end] - first

    def rows_of(self, spec: TensorSpec, first: int, last: int) -> Sequence[int]:
        """Its rows that have elements of [first, last), ascending."""
        low, high = first // spec.columns, -(-last // spec.columns)
        if self.rows is None:
            return range(low, high)
        return self._row_numbers[bisect_left(self._row_numbers, low) : bisect_left(self._row_numbers, high)]

    def has_words(self, spec: TensorSpec) -> bool:
        """Whether its marks are words of bits, and so many that a pass over the tensor is faster than an index."""
        return self.is_whole or (spec.columns % philox.BITS == 0 and self.share(spec) > FUSED_ABOVE)

    @cached_property
    def _row_numbers(self) -> list[int]:
        numbers: list[int] = cast(Tensor, self.rows).tolist()
        return numbers

    @cached_property
    def _column_numbers(self) -> list[int]:
        numbers: list[int] = cast(Tensor, self.columns).tolist()
        return numbers


def _count_before(position: int, rows: Sequence[int], columns: Sequence[int], width: int) -> int:
    """How many of rows x columns lie before a flat position."""
    row, column = divmod(position, width)
    above = bisect_left(rows, row)
    is_within = above < len(rows) and rows[above] == row
    return above * len(columns) + (bisect_left(columns, column) if is_within else 0)


def marks_of(supports: Sequence[tuple[TensorSpec, Support]]) -> Tensor:
    """The marks of `Mask` of tensors, one after the other: uint8 on the CPU."""
    chosen, starts, start = list[Tensor](), list[int](), 0
    for spec, support in supports:
        chosen.append(torch.arange(spec.rows) if support.rows is None else support.rows)
        chosen.append(torch.arange(spec.columns) if support.columns is None else support.columns)
        starts += (start, start + spec.rows)
        start += spec.rows + spec.columns
    marks = torch.zeros(start, dtype=torch.uint8)
    if chosen:
        marks[torch.cat(chosen) + torch.tensor(starts).repeat_interleave(torch.tensor([*map(len, chosen)]))] = 1
    return marks
