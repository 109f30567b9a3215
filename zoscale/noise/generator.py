"""Counter-based random numbers: every draw is a pure function of its coordinates.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The 64-bit
seed is the key; (element block, tensor id, step, direction and domain) are the four counter words. So any slice of
any tensor, on any device and any sharding, is the same slice of the same numbers, and no global generator is
touched. One Philox call yields four 32-bit words; element ``i`` owns lane ``i % 4`` of block ``i // 4``.

The arithmetic is plain tensor operations on int32 (wrapping multiplication, 16-bit halves for the high word), which
`torch.compile` fuses into one pass: vector C++ on the CPU, Triton on the GPU.
"""

import functools
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoscale.grouping import alike
from zoscale.noise import philox
from zoscale.noise.fused import compiled, on_device

_BLOCK_MULTIPLE = 64  # blocks per call are a multiple of this: whole vectors only, so a value has one code path
_KEPT_BLOCKS = 2**20  # 8 MiB of counters per device, enough for 2**22 elements a call
_KEPT_DRAW = 2**13  # blocks of several ranges whose counters are kept for the next step: 64 KiB
_LONG_RANGE = 2**9  # blocks from which counters of a range are cheaper by operations of its own
_KEPT_RANGES = 128  # more are those of a lookup, which no other step has
_KEPT_DRAWS = 1024
_SIGN = -(2**31)  # words without it sort as signed numbers like unsigned ones
_LONG = 2**14  # elements from which signs stay bits

Device = torch.device | str


class Domain(IntEnum):
    """What a draw is for; draws of different domains are independent."""

    VALUE = 0
    SUPPORT = 1
    SUPPORT_COLUMNS = 2
    DATA = 3
    FACTOR = 4
    LAYERS = 5
    EXPANSION = 6
    ROUNDING = 7


class Key(NamedTuple):
    """Coordinates shared by the draws of one call.

    Args:
        step: training step, 0 <= step < 2**32.
        direction: index k of the direction within the step, 0 <= direction < 2**24.
        domain: what the numbers are for.
    """

    step: int
    direction: int = 0
    domain: Domain = Domain.VALUE


class Range(NamedTuple):
    """Elements [start, stop) of a tensor, 0 <= tensor < 2**32, 0 <= start <= stop <= 2**34."""

    tensor: int
    start: int
    stop: int


class Noise:
    """Random numbers of one seed. Each call draws any number of ranges in one pass of the generator.

    Args:
        seed: 0 <= seed < 2**64.
        compiled: fuse the generator with `torch.compile` where a compiler is there (one warning and eager execution
            where not). Integers are the same bits either way; normals agree to 1e-6.
    """

    def __init__(self, seed: int, *, compiled: bool = False) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"expected a seed in [0, 2**64), got {seed}; choose a non-negative integer")
        self.seed = seed
        self.compiled = compiled

    def words(self, key: Key, ranges: Sequence[Range], device: Device = "cpu") -> list[Tensor]:
        """Raw words: per range int32 [stop - start], the bit patterns of unsigned 32-bit words."""
        return self._draw(philox.words, key, ranges, device)

    def uniform(self, key: Key, ranges: Sequence[Range], device: Device = "cpu") -> list[Tensor]:
        """Uniform on [0, 1) with 24 random bits: per range float32 [stop - start]."""
        return self._draw(philox.uniform, key, ranges, device)

    def normal(self, key: Key, ranges: Sequence[Range], device: Device = "cpu") -> list[Tensor]:
        """Standard normals by Box-Muller, |z| <= 5.77: per range float32 [stop - start]."""
        return self._draw(philox.normal, key, ranges, device)

    def rademacher(self, key: Key, ranges: Sequence[Range], device: Device = "cpu") -> list[Tensor]:
        """Signs +1 or -1 with equal probability: per range float32 [stop - start].

        Element i is bit i % 32 of word i // 32.
        """
        return _unpacked(self.sign_words(key, ranges, device), ranges)

    def sign_bits(self, key: Key, ranges: Sequence[Range], device: Device = "cpu") -> list[Tensor]:
        """`rademacher`, but where `stays_bits` says so as int32 [1, (stop - start) / 32], see `philox.signs`."""
        found = self.sign_words(key, ranges, device)
        rest = [(own, wanted) for own, wanted in zip(found, ranges, strict=True) if not stays_bits(wanted)]
        values = iter(_unpacked([own for own, _ in rest], [wanted for _, wanted in rest]))
        return [own[None] if stays_bits(wanted) else next(values) for own, wanted in zip(found, ranges, strict=True)]

    def sign_words(self, key: Key, ranges: Sequence[Range], device: Device = "cpu") -> list[Tensor]:
        """The words whose bits are the signs of each range, the first and the last one whole: int32 per range."""
        words = [Range(t, start // philox.BITS, -(-stop // philox.BITS)) for t, start, stop in ranges]
        return self.words(key, words, device)

    def integers(self, key: Key, limits: Sequence[tuple[int, int]]) -> list[int]:
        """For each (tensor id, n), n < 2**63: an integer uniform on [0, n), from 64 bits (bias below n / 2**64)."""
        drawn = self.words(key, [Range(tensor, 0, 2) for tensor, _ in limits])
        words = torch.stack(drawn).to(torch.int64) & 0xFFFFFFFF
        return [n * (high << 32 | low) >> 64 for (_, n), (high, low) in zip(limits, words.tolist(), strict=True)]

    def choices(self, key: Key, wanted: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """For each (tensor id, n, k): k of n positions without replacement, uniform over subsets.

        The k positions with the smallest (word, position).

        Returns:
            Sorted int64 tensors on the CPU, of length k each.
        """
        for tensor, n, k in wanted:
            if not 0 <= k <= n:
                raise ValueError(f"expected 0 <= k <= n for tensor {tensor}, got k={k}, n={n}")
        words = self.words(key, [Range(tensor, 0, n) for tensor, n, _ in wanted])
        found: dict[int, Tensor] = {}
        for places in alike((n, k) for _, n, k in wanted):
            together = torch.stack([words[place] for place in places])
            found |= zip(places, _smallest(together, wanted[places[0]][2]), strict=True)
        return [found[place] for place in range(len(wanted))]

    def permutation(self, key: Key, n: int) -> Tensor:
        """A random order of [0, n), uniform: int64 [n] on the CPU."""
        if n < 2:
            return torch.arange(n)
        (words,) = self.words(key, [Range(0, 0, n)])
        return torch.argsort(_ranks(words))

    def _draw(self, kernel: philox.Kernel, key: Key, ranges: Sequence[Range], device: Device) -> list[Tensor]:
        """Run a kernel over the blocks that cover the ranges, and cut the ranges out."""
        for tensor, start, stop in ranges:
            if not (0 <= tensor < 2**32 and 0 <= start <= stop <= 2**34):
                raise ValueError(
                    f"expected a tensor id and elements 0 <= start <= stop <= 2**34, got {tensor, start, stop}"
                )
        firsts = [start // 4 for _, start, _ in ranges]
        sizes = [-(-stop // 4) - first for (_, _, stop), first in zip(ranges, firsts, strict=True)]
        if not sum(sizes):
            return [torch.empty(0, dtype=philox.DTYPES[kernel], device=device) for _ in ranges]
        if len(ranges) == 1:  # large tensors: no host work and no counters to make
            blocks, tensors = _first_blocks(sizes[0], device)
            shared = self._words(key, firsts[0], ranges[0].tensor)
        else:
            is_kept = sum(sizes) <= _KEPT_DRAW and len(ranges) <= _KEPT_RANGES
            counters = _kept_counters if is_kept else _counters
            blocks, tensors = counters(tuple(own.tensor for own in ranges), tuple(firsts), tuple(sizes), device)
            shared = self._words(key)
        run = compiled(kernel) if self.compiled else kernel
        drawn = run(blocks, tensors, on_device(torch.tensor(shared, dtype=torch.int32), device))
        begins = [4 * (end - size) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        skips = [start % 4 for _, start, _ in ranges]
        return [
            drawn[begin + skip : begin + skip + stop - start]
            for begin, skip, (_, start, stop) in zip(begins, skips, ranges, strict=True)
        ]

    def _words(self, key: Key, first: int = 0, tensor: int = 0) -> list[int]:
        for name, value, limit in (("step", key.step, 2**32), ("direction", key.direction, 2**24)):
            if not 0 <= value < limit:
                raise ValueError(f"expected 0 <= {name} < {limit}, got {value}")
        counters = (first, tensor, key.step, key.direction | key.domain << 24)
        return philox.shared_words(counters, self.seed)


def signs_at(words: Tensor, wanted: Range, index: Tensor) -> Tensor:
    """Signs of some elements of a range, as `Noise.rademacher` has them.

    Args:
        words: of the range, from `Noise.sign_words`.
        wanted: the range.
        index: int64 on the device of the words, relative to its start.

    Returns:
        float32 of the shape of `index`.
    """
    position = index + wanted.start % philox.BITS
    return philox.sign((words[position // philox.BITS] >> (position % philox.BITS).to(torch.int32)) & 1)


def stays_bits(wanted: Range) -> bool:
    """Whether a range is of whole words, and so long that unpacking them where they are used is faster."""
    _, start, stop = wanted
    return start % philox.BITS == 0 and stop % philox.BITS == 0 and stop - start >= _LONG


def _unpacked(words: Sequence[Tensor], ranges: Sequence[Range]) -> list[Tensor]:
    """The signs of ranges in float32, from words that cover each."""
    if not words:
        return []
    signs = philox.signs(torch.cat(list(words)) if len(words) > 1 else words[0]).view(-1)
    parts = torch.split(signs, [philox.BITS * len(own) for own in words])
    skips = [start % philox.BITS for _, start, _ in ranges]
    return [own[skip:][: stop - start] for own, skip, (_, start, stop) in zip(parts, skips, ranges, strict=True)]


def _padded(blocks: int) -> int:
    return blocks + -blocks % _BLOCK_MULTIPLE


@functools.cache
def _kept_blocks(device: Device) -> tuple[Tensor, Tensor]:
    return _new_blocks(_KEPT_BLOCKS, device)


def _new_blocks(count: int, device: Device) -> tuple[Tensor, Tensor]:
    blocks = torch.arange(count, dtype=torch.int32, device=device)
    return blocks, torch.zeros_like(blocks)


def _first_blocks(count: int, device: Device) -> tuple[Tensor, Tensor]:
    """Blocks 0, 1, ... of tensor 0, padded to whole vectors; from memory that is kept, up to a size."""
    padded = _padded(count)
    if padded > _KEPT_BLOCKS:
        return _new_blocks(padded, device)
    blocks, zeros = _kept_blocks(device)
    return blocks[:padded], zeros[:padded]


def _counters(ids: Sequence[int], firsts: Sequence[int], sizes: Sequence[int], device: Device) -> tuple[Tensor, Tensor]:
    """Counter words 0 (element block) and 1 (tensor id) of all blocks: int32, padded to whole vectors."""
    total = sum(sizes)
    padded = _padded(total)
    if total >= _LONG_RANGE * len(sizes):
        return _long_counters(ids, firsts, sizes, padded, device)
    counts = torch.tensor([*sizes, padded - total])
    ends = counts.cumsum(0)
    shift = torch.tensor([*firsts, 0]) - (ends - counts)
    tensors = torch.tensor([*map(philox.signed, ids), 0], dtype=torch.int32)
    blocks = torch.arange(padded) + shift.repeat_interleave(counts)
    return on_device(blocks.to(torch.int32), device), on_device(tensors.repeat_interleave(counts), device)


def _long_counters(
    ids: Sequence[int], firsts: Sequence[int], sizes: Sequence[int], padded: int, device: Device
) -> tuple[Tensor, Tensor]:
    """`_counters` of ranges so long that an operation for each is cheap: written once, where they are used."""
    blocks, tensors = torch.zeros(2, padded, dtype=torch.int32, device=device)
    counted, _ = _first_blocks(max(sizes), device)
    for tensor, first, end, size in zip(ids, firsts, accumulate(sizes), sizes, strict=True):
        torch.add(counted[:size], philox.signed(first), out=blocks[end - size : end])
        tensors[end - size : end] = philox.signed(tensor)
    return blocks, tensors


_kept_counters = functools.lru_cache(_KEPT_DRAWS)(_counters)


def _ranks(words: Tensor) -> Tensor:
    """Distinct int64 keys that sort like (unsigned word, position)."""
    position = torch.arange(len(words), device=words.device)
    return (words.to(torch.int64) & 0xFFFFFFFF) << 31 | position


def _smallest(words: Tensor, k: int) -> Tensor:
    """Positions of the k smallest (unsigned word, position) of each row, ascending: int64 [m, k] of int32 [m, n].

    NumPy finds the k-th word by vector instructions, an order of magnitude faster than `torch.topk` or `kthvalue`.
    """
    rows, n = words.shape
    if k in (0, n):
        return torch.arange(k).repeat(rows, 1)
    ordered = words ^ _SIGN
    last = torch.from_numpy(np.partition(ordered.numpy(), k - 1)[:, k - 1, None])
    marks = ordered <= last
    if int(marks.sum()) > rows * k:  # other words are the same as the last one: the first of them
        below, same = ordered < last, ordered == last
        marks = below | (same & (same.cumsum(-1) <= k - below.sum(-1, keepdim=True)))
    return marks.nonzero()[:, 1].view(rows, k)
