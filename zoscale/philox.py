"""Philox4x32-10 and its distributions as kernels: plain int32 tensor operations that `torch.compile` fuses.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. int32 multiplication wraps; the high word of a
product is put together from 16-bit halves. Each kernel takes the blocks' counter words 0 and 1 (int32 [B] each) and
`shared_words`, and gives four elements per block.
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
_MASK = 0xFFFFFFFF
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
    middle = a_high * signed(m_low) + _high(a_low * signed(m_low))
    carry = (middle & 0xFFFF) + a_low * m_high
    return a_high * m_high + _high(middle) + _high(carry), a * signed(m)


def shared_words(counters: tuple[int, int, int, int], seed: int) -> list[int]:
    """What all blocks of a call have in common, as int32 bit patterns, with the first round done where it can be.

    The kernels only ever combine these with vectors. Arithmetic among them would be compiled to scalar C++, where
    int32 must not wrap.

    Args:
        counters: counter words 0 to 3; the first is added to each block's own, the second is xored with it.
        seed: 64-bit key.
    """
    first, tensor, step, last = counters
    keys = key_schedule(seed)
    product = step * _MULTIPLIERS[1]
    of_first_round = (product >> 32 ^ tensor ^ keys[0], product & _MASK, last ^ keys[1])
    return [signed(word) for word in (first, *of_first_round, *keys[2:])]


def key_schedule(seed: int) -> list[int]:
    """The two key words of each round, in order: unsigned 32-bit."""
    low, high = seed & _MASK, seed >> 32
    return [(key + i * step) & _MASK for i in range(_ROUNDS) for key, step in zip((low, high), _WEYL, strict=True)]


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Rounds of Philox4x32 on four counter words, as many as there are pairs of keys; 10 rounds are Philox4x32-10.

    Args:
        c0, c1, c2, c3: int32 bit patterns, broadcastable; c0 and c2 of full shape.
        keys: `key_schedule` as int32 scalars.
    """
    for k0, k1 in zip(keys[::2], keys[1::2], strict=True):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _run(blocks: Tensor, tensors: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10; what the blocks share of the first round comes from the host."""
    first, high1, low1, last, *keys = shared.unbind()
    high0, low0 = _multiply(blocks + first, _MULTIPLIERS[0])
    return philox(tensors ^ high1, low1, high0 ^ last, low0, keys)


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
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    cosine, sine = _unit_vector(_top24(angle_word))
    return radius * cosine, radius * sine


def _unit_vector(turn: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi turn / 2**24, to 1e-7: one polynomial each, on an eighth of a turn either side.

    The upper two bits choose the quadrant, so the range reduction is exact and costs nothing.
    """
    quadrant, rest = turn >> 22, (turn & 0x3FFFFF) - 2**21
    x = rest.to(torch.float32) * (math.pi / 2 * 2.0**-22)
    y = x * x
    sine = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y / 362880))))
    cosine = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y / 40320)))
    first, second = (cosine - sine) * math.sqrt(0.5), (cosine + sine) * math.sqrt(0.5)  # an eighth of a turn on
    odd = (quadrant & 1) == 1
    a, b = torch.where(odd, -second, first), torch.where(odd, first, second)
    half = quadrant >= 2
    return torch.where(half, -a, a), torch.where(half, -b, b)


@functools.cache
def compiled(kernel: Kernel) -> Kernel:
    """The kernel under torch.compile (one graph for all sizes), or the kernel itself where that fails."""
    chosen: list[Kernel] = []

    def call(blocks: Tensor, tensors: Tensor, shared: Tensor) -> Tensor:
        if chosen:
            return chosen[0](blocks, tensors, shared)
        try:
            fused = torch.compile(kernel, dynamic=True, fullgraph=True)
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
