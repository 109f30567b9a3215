"""`Direction` and `Probe`: z of one (step, k) on any slice of any tensor, without ever holding z whole."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoscale.noise.generator import Domain, Key, Noise, Range
from zoscale.noise.segments import Segment
from zoscale.noise.streams import Stream
from zoscale.shards import STREAMED, ShardedParam, TensorSpec, chunk

_PACKED = 4  # a draw of bits is cheap, and a call of the generator is not


class Piece(NamedTuple):
    """Elements [start, stop) of a shard's local slice."""

    shard: ShardedParam
    start: int
    stop: int

    @property
    def range(self) -> Range:
        """The same elements in the whole tensor."""
        offset = self.shard.offset
        return Range(self.shard.spec.id, offset + self.start, offset + self.stop)


def pieces(
    shards: Iterable[ShardedParam],
    limit: int | None = None,
    *,
    stream: Callable[[Piece], object] = lambda _: None,
    is_bits: Callable[[Piece], bool] = lambda _: False,
) -> Iterator[list[Piece]]:
    """All elements of the local slices, in groups of at most `limit` elements (None = a chunk of their device).

    One group is drawn in one pass of the generator: many small tensors share it, a large one is cut. Of tensors whose z
    is drawn as bits, as `is_bits` says, pieces and groups have up to `_PACKED` times as many elements. What is larger
    than a chunk and never drawn to memory, because `stream` has coordinates of it, is cut into pieces of `STREAMED`
    elements, each of which begins a group.
    """
    group: list[Piece] = []
    size = 0
    for shard in shards:
        most = limit or chunk(shard.truth.device)
        is_streamed = limit is None and len(shard) > most and stream(Piece(shard, 0, len(shard))) is not None
        packed = _PACKED if not is_streamed and is_bits(Piece(shard, 0, len(shard))) else 1
        longest = STREAMED if is_streamed else most * packed
        for start in range(0, len(shard), longest):
            piece = Piece(shard, start, min(start + longest, len(shard)))
            share = (piece.stop - piece.start) // packed
            if group and (is_streamed or size + share > most):
                yield group
                group, size = [], 0
            group.append(piece)
            size += share
    if group:
        yield group


class Patch(NamedTuple):
    """z on a matrix that is zero but for a few rows and columns.

    Args:
        rows, columns: int64, ascending.
        values: z there, float32 [rows, columns].
    """

    rows: Tensor
    columns: Tensor
    values: Tensor


class Direction(ABC):
    """z of one (step, k): made piece by piece, wherever it is asked for."""

    @abstractmethod
    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        """z on each piece, float32 on the shards' device; None where it is zero. The pieces share a device."""

    def stream(self, piece: Piece) -> Stream | None:
        """z on a piece as coordinates, for kernels that make it in registers; None where it must be drawn."""
        return None

    def is_bits(self, piece: Piece) -> bool:
        """Whether z on a piece is signs as bits, if it is not zero there; known without drawing it."""
        return False

    def is_patch(self, spec: TensorSpec) -> bool:
        """Whether z on a tensor is zero but for a few rows and columns, which `patches` gives."""
        return False

    def patches(self, specs: Sequence[TensorSpec], device: torch.device) -> list[Patch]:
        """z on tensors of which `is_patch` holds, drawn in one pass."""
        raise ValueError(f"expected a direction of a few rows and columns, got {type(self).__name__}")

    def touches(self, spec: TensorSpec) -> bool:
        """Whether z may be other than zero on a tensor; known without drawing it."""
        return True

    @property
    def is_compiled(self) -> bool:
        """Whether z is drawn by compiled kernels, and what is done with it fused likewise."""
        return False

    def rounding_words(self, piece: Piece) -> Tensor:
        """Random words of the step to round the elements of a piece with: int32, the same for all its directions.

        Raises:
            ValueError: if the direction is not made of noise.
        """
        raise ValueError(f"expected a direction that is drawn for stochastic rounding, got {type(self).__name__}")


class DrawnDirection(Direction):
    """z regenerated from the noise of (step, k)."""

    def __init__(self, noise: Noise, step: int, k: int) -> None:
        self.noise = noise
        self.key = Key(step, k)

    @property
    def is_compiled(self) -> bool:
        return self.noise.compiled

    def rounding_words(self, piece: Piece) -> Tensor:
        key = Key(self.key.step, domain=Domain.ROUNDING)
        (words,) = self.noise.words(key, [piece.range], piece.shard.truth.device)
        return words


class Probe(ABC):
    """Draws directions for a list of tensors."""

    is_elementwise: bool = True
    """Whether z needs no matrix product: its bits depend on no number of threads then."""

    @abstractmethod
    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> Direction:
        """The k-th direction of a step over all trainable tensors (`specs` sorted by id)."""
