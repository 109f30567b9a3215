"""Philox4x32-10 and its distributions as kernels: plain int32 tensor operations that `torch.compile` fuses.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. int32 multiplication wraps; the high word of a
product is put together from 16-bit halves. Each kernel takes the blocks' counter words 0 and 1 (int32 [B]) and the
words that all blocks share (int32 [4]: counter words 2 and 3, the two key words), and gives four elements per block.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_UNIT = 2.0**-24  # a word's top 24 bits are exact in float32


def signed(word: int) -> int:
    """The int32 value with the bit pattern of an unsigned 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def _high(a: Tensor) -> Tensor:
    """Upper 16 bits of each 32-bit pattern (a logical shift: int32 `>>` is arithmetic)."""
    return (a >> 16) & 0xFFFF


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of the unsigned 64-bit product of `a` and the constant `m`, in wrapping int32."""
    a_low, a_high, m_low, m_high = a & 0xFFFF, _high(a), m & 0xFFFF, m >> 16
    low_low, low_high, high_low = a_low * signed(m_low), a_low * m_high, a_high * m_low
    middle = _high(low_low) + (low_high & 0xFFFF) + (high_low & 0xFFFF)
    return a_high * m_high + _high(low_high) + _high(high_low) + (middle >> 16), a * signed(m)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words (int32 bit patterns, broadcastable) to four words."""
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + signed(_WEYL[0]), k1 + signed(_WEYL[1])
    return c0, c1, c2, c3


def _run(blocks: Tensor, tensors: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
    step, last, key0, key1 = (blocks * 0 + word for word in shared)
    return philox(blocks, tensors, step, last, key0, key1)


def _interleave(lanes: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(lanes), dim=-1).view(-1)


def words(blocks: Tensor, tensors: Tensor, shared: Tensor) -> Tensor:
    return _interleave(_run(blocks, tensors, shared))


def uniform(blocks: Tensor, tensors: Tensor, shared: Tensor) -> Tensor:
    return _interleave([_top24(word).to(torch.float32) * _UNIT for word in _run(blocks, tensors, shared)])


def normal(blocks: Tensor, tensors: Tensor, shared: Tensor) -> Tensor:
    w0, w1, w2, w3 = _run(blocks, tensors, shared)
    return _interleave([*_box_muller(w0, w1), *_box_muller(w2, w3)])


def _top24(word: Tensor) -> Tensor:
    return (word >> 8) & 0xFFFFFF


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    uniform = (_top24(radius_word) + 1).to(torch.float32) * _UNIT  # (0, 1]: the logarithm is finite
    angle = _top24(angle_word).to(torch.float32) * (_UNIT * 2 * math.pi)
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    return radius * torch.cos(angle), radius * torch.sin(angle)


@functools.cache
def compiled(kernel: Kernel) -> Kernel:
    """The kernel under torch.compile (one graph for all sizes), or the kernel itself where that fails."""
    fused = torch.compile(kernel, dynamic=True, fullgraph=True)
    chosen: list[Kernel] = []

    def call(blocks: Tensor, tensors: Tensor, shared: Tensor) -> Tensor:
        if chosen:
            return chosen[0](blocks, tensors, shared)
        try:
            result = fused(blocks, tensors, shared)
            chosen.append(fused)
        except Exception as error:  # whatever a missing or broken compiler raises
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            warnings.warn(
                f"noise runs in eager mode, several times slower: torch.compile failed: {reason[0]}", stacklevel=2
            )
            chosen.append(kernel)
            result = kernel(blocks, tensors, shared)
        return result

    return call


DTYPES: dict[Kernel, torch.dtype] = {words: torch.int32, uniform: torch.float32, normal: torch.float32}
"""Element type of each kernel's result."""
