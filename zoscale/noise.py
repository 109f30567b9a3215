"""Counter-based random numbers: every draw is a pure function of its coordinates.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The 64-bit
seed is the key; (element block, tensor id, step, direction and domain) are the four counter words. So any slice of
any tensor, on any device and any sharding, is the same slice of the same numbers, and no global generator is
touched. One Philox call yields four 32-bit words; element ``i`` owns lane ``i % 4`` of block ``i // 4``.

The arithmetic is plain tensor operations on int32 (wrapping multiplication, 16-bit halves for the high word), which
`torch.compile` fuses into one pass: vector C++ on the CPU, Triton on the GPU.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_UNIT = 2.0**-24  # a word's top 24 bits are exact in float32
_BLOCK_MULTIPLE = 64  # blocks per call are a multiple of this: whole vectors only, so a value has one code path
_BITS = 32


Device = torch.device | str
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class Domain(IntEnum):
    """What a draw is for; draws of different domains are independent."""

    VALUE = 0
    SUPPORT = 1
    SUPPORT_COLUMNS = 2
    DATA = 3


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
        return self._draw(_words_kernel, key, ranges, device)

    def uniform(self, key: Key, ranges: Sequence[Range], device: Device = "cpu") -> list[Tensor]:
        """Uniform on [0, 1) with 24 random bits: per range float32 [stop - start]."""
        return self._draw(_uniform_kernel, key, ranges, device)

    def normal(self, key: Key, ranges: Sequence[Range], device: Device = "cpu") -> list[Tensor]:
        """Standard normals by Box-Muller, |z| <= 5.77: per range float32 [stop - start]."""
        return self._draw(_normal_kernel, key, ranges, device)

    def rademacher(self, key: Key, ranges: Sequence[Range], device: Device = "cpu") -> list[Tensor]:
        """Signs +1 or -1 with equal probability: per range float32 [stop - start].

        Element i is bit i % 32 of word i // 32.
        """
        shifts = torch.arange(_BITS, dtype=torch.int32, device=device)
        signs = []
        for wanted, words in zip(ranges, self._sign_words(key, ranges, device), strict=True):
            bits = (words[:, None] >> shifts) & 1
            skip = wanted.start % _BITS
            signs.append(_sign(bits).view(-1)[skip : skip + wanted.stop - wanted.start])
        return signs

    def rademacher_at(
        self, key: Key, ranges: Sequence[Range], indices: Sequence[Tensor], device: Device = "cpu"
    ) -> list[Tensor]:
        """Signs of some elements of each range: `rademacher(...)[r][indices[r]]`, at one word per 32 elements.

        Args:
            key, ranges: as for `rademacher`.
            indices: per range int64 on the device, relative to its start.

        Returns:
            Per range float32 of the shape of its indices.
        """
        signs = []
        for wanted, words, index in zip(ranges, self._sign_words(key, ranges, device), indices, strict=True):
            position = index + wanted.start % _BITS
            signs.append(_sign((words[position // _BITS] >> (position % _BITS).to(torch.int32)) & 1))
        return signs

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
        return [_smallest(drawn, k) for drawn, (_, _, k) in zip(words, wanted, strict=True)]

    def permutation(self, key: Key, n: int) -> Tensor:
        """A random order of [0, n), uniform: int64 [n] on the CPU."""
        (words,) = self.words(key, [Range(0, 0, n)])
        return torch.argsort(_ranks(words))

    def _sign_words(self, key: Key, ranges: Sequence[Range], device: Device) -> list[Tensor]:
        return self.words(key, [Range(t, start // _BITS, -(-stop // _BITS)) for t, start, stop in ranges], device)

    def _draw(self, kernel: Kernel, key: Key, ranges: Sequence[Range], device: Device) -> list[Tensor]:
        """Run a kernel over the blocks that cover the ranges, and cut the ranges out."""
        for tensor, start, stop in ranges:
            if not (0 <= tensor < 2**32 and 0 <= start <= stop <= 2**34):
                raise ValueError(
                    f"expected a tensor id and elements 0 <= start <= stop <= 2**34, got {tensor, start, stop}"
                )
        firsts = [start // 4 for _, start, _ in ranges]
        sizes = [-(-stop // 4) - first for (_, _, stop), first in zip(ranges, firsts, strict=True)]
        if not sum(sizes):
            return [torch.empty(0, dtype=_DTYPES[kernel], device=device) for _ in ranges]
        blocks, tensors = _counters(ranges, firsts, sizes, device)
        run = _compiled(kernel) if self.compiled else kernel
        drawn = run(blocks, tensors, torch.tensor(self._words(key), dtype=torch.int32, device=device))
        begins = [4 * (end - size) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        skips = [start % 4 for _, start, _ in ranges]
        return [
            drawn[begin + skip : begin + skip + stop - start]
            for begin, skip, (_, start, stop) in zip(begins, skips, ranges, strict=True)
        ]

    def _words(self, key: Key) -> list[int]:
        for name, value, limit in (("step", key.step, 2**32), ("direction", key.direction, 2**24)):
            if not 0 <= value < limit:
                raise ValueError(f"expected 0 <= {name} < {limit}, got {value}")
        words = (key.step, key.direction | key.domain << 24, self.seed & 0xFFFFFFFF, self.seed >> 32)
        return [_signed(word) for word in words]


def _counters(
    ranges: Sequence[Range], firsts: Sequence[int], sizes: Sequence[int], device: Device
) -> tuple[Tensor, Tensor]:
    """Counter words 0 (element block) and 1 (tensor id) of all blocks: int32, padded to whole vectors."""
    total = sum(sizes)
    padded = total + -total % _BLOCK_MULTIPLE
    if len(ranges) == 1:  # no host work and no copy in the case of large tensors
        blocks = torch.arange(firsts[0], firsts[0] + padded, device=device).to(torch.int32)
        return blocks, torch.full_like(blocks, _signed(ranges[0].tensor))
    counts = torch.tensor([*sizes, padded - total])
    ends = counts.cumsum(0)
    shift = torch.tensor([*firsts, 0]) - (ends - counts)
    tensors = torch.tensor([*(_signed(tensor) for tensor, _, _ in ranges), 0], dtype=torch.int32)
    blocks = torch.arange(padded) + shift.repeat_interleave(counts)
    return blocks.to(torch.int32).to(device), tensors.repeat_interleave(counts).to(device)


@functools.cache
def _compiled(kernel: Kernel) -> Kernel:
    """The kernel under torch.compile (one graph for all sizes), or the kernel itself where that fails."""
    fused = torch.compile(kernel, dynamic=True, fullgraph=True)
    chosen: list[Kernel] = []

    def call(blocks: Tensor, tensors: Tensor, words: Tensor) -> Tensor:
        if chosen:
            return chosen[0](blocks, tensors, words)
        try:
            result = fused(blocks, tensors, words)
            chosen.append(fused)
        except Exception as error:  # whatever a missing or broken compiler raises
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            warnings.warn(
                f"noise runs in eager mode, several times slower: torch.compile failed: {reason[0]}", stacklevel=2
            )
            chosen.append(kernel)
            result = kernel(blocks, tensors, words)
        return result

    return call


def _signed(word: int) -> int:
    """The int32 value with the bit pattern of an unsigned 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def _high(a: Tensor) -> Tensor:
    """Upper 16 bits of each 32-bit pattern (a logical shift: int32 `>>` is arithmetic)."""
    return (a >> 16) & 0xFFFF


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of the unsigned 64-bit product of `a` and the constant `m`, in wrapping int32."""
    a_low, a_high, m_low, m_high = a & 0xFFFF, _high(a), m & 0xFFFF, m >> 16
    low_low, low_high, high_low = a_low * _signed(m_low), a_low * m_high, a_high * m_low
    middle = _high(low_low) + (low_high & 0xFFFF) + (high_low & 0xFFFF)
    return a_high * m_high + _high(low_high) + _high(high_low) + (middle >> 16), a * _signed(m)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words (int32 bit patterns, broadcastable) to four words."""
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _signed(_WEYL[0]), k1 + _signed(_WEYL[1])
    return c0, c1, c2, c3


def _philox_kernel(blocks: Tensor, tensors: Tensor, words: Tensor) -> tuple[Tensor, ...]:
    step, last, key0, key1 = (blocks * 0 + word for word in words)
    return philox(blocks, tensors, step, last, key0, key1)


def _interleave(lanes: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(lanes), dim=-1).view(-1)


def _words_kernel(blocks: Tensor, tensors: Tensor, words: Tensor) -> Tensor:
    return _interleave(_philox_kernel(blocks, tensors, words))


def _uniform_kernel(blocks: Tensor, tensors: Tensor, words: Tensor) -> Tensor:
    return _interleave([_top24(word).to(torch.float32) * _UNIT for word in _philox_kernel(blocks, tensors, words)])


def _normal_kernel(blocks: Tensor, tensors: Tensor, words: Tensor) -> Tensor:
    w0, w1, w2, w3 = _philox_kernel(blocks, tensors, words)
    return _interleave([*_box_muller(w0, w1), *_box_muller(w2, w3)])


def _top24(word: Tensor) -> Tensor:
    return (word >> 8) & 0xFFFFFF


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    uniform = (_top24(radius_word) + 1).to(torch.float32) * _UNIT  # (0, 1]: the logarithm is finite
    angle = _top24(angle_word).to(torch.float32) * (_UNIT * 2 * math.pi)
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _sign(bits: Tensor) -> Tensor:
    return (1 - 2 * bits).to(torch.float32)


def _ranks(words: Tensor) -> Tensor:
    """Distinct int64 keys that sort like (unsigned word, position)."""
    position = torch.arange(len(words), device=words.device)
    return (words.to(torch.int64) & 0xFFFFFFFF) << 31 | position


def _smallest(words: Tensor, k: int) -> Tensor:
    if k == len(words):
        return torch.arange(k)
    return torch.topk(_ranks(words), k, largest=False, sorted=False).indices.sort().values


_DTYPES: dict[Kernel, torch.dtype] = {
    _words_kernel: torch.int32,
    _uniform_kernel: torch.float32,
    _normal_kernel: torch.float32,
}
