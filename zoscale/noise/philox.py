"""Philox4x32-10 and its distributions as kernels: plain int32 tensor operations that `torch.compile` fuses.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. int32 multiplication wraps; the high word of a
product is put together from 16-bit halves. Each kernel takes the blocks' counter words 0 and 1 (int32 [B] each) and
`shared_words`, and gives four elements per block.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF
BITS = 32  # signs in a word
_ONE, _SIGN = 0x3F800000, -(2**31)  # float32 1 as a bit pattern, and its sign bit
_UNIT = 2.0**-24  # a word's top 24 bits are exact in float32
SQRT_HALF_BITS = 0x3F3504F3  # of float32 sqrt(1/2)
LOG_2 = (0.693359375, -2.12194440e-4)  # a part that is exact times small integers, and the rest
LOG_SERIES = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def signed(word: int) -> int:
    """The int32 value with the bit pattern of an unsigned 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of the unsigned 64-bit product of `a` and the constant `m`, in wrapping int32.

    The high word is that of the signed product (four products of 16-bit halves, none of which wraps, Warren, "Hacker's
    Delight", section 8-2) plus what a negative bit pattern stands for too little: `a` for `m`, and `m` for `a`.
    """
    m_signed = signed(m)
    m_low = (m_signed + 0x8000) % 2**16 - 0x8000
    m_high = (m_signed - m_low) >> 16
    a_low, a_high = a & 0xFFFF, a >> 16
    middle = a_high * m_low + (a_low * m_low >> 16)
    carry = (middle & 0xFFFF) + a_low * m_high
    high = a_high * m_high + (middle >> 16) + (carry >> 16)
    return high + a + ((a >> 31) & m_signed), a * m_signed


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


def signs(words: Tensor, mask: Tensor | None = None) -> Tensor:
    """float32 [W, BITS]: +1 where a bit of int32 [W] is clear and -1 where it is set, lowest bits first.

    Args:
        words: int32 [W].
        mask: int32 [W]; the result is 0 where its bit is clear. None = nowhere.
    """
    shifts = torch.arange(BITS - 1, -1, -1, dtype=torch.int32, device=words.device)
    bits = (words[:, None] << shifts).bitwise_and_(_SIGN).bitwise_or_(_ONE)  # in place: one temporary
    if mask is not None:
        bits.bitwise_and_((mask[:, None] << shifts) >> (BITS - 1))
    return bits.view(torch.float32)


def chosen_signs(words: Tensor, mask: Tensor | None = None) -> Tensor:
    """`signs` by choices instead of bit patterns, which a graph of 16-bit results puts to memory and reads again."""
    places = torch.arange(BITS, dtype=torch.int32, device=words.device)
    bits = torch.ones_like(places) << places
    z = torch.where((words[:, None] & bits) != 0, -1.0, 1.0)
    return z if mask is None else torch.where((mask[:, None] & bits) != 0, z, 0.0)


def packed(marks: Tensor) -> Tensor:
    """Bits in words, lowest first: int32 [n / BITS] from 0 and 1 (integers [n])."""
    shifts = torch.arange(BITS, device=marks.device)
    return (marks.view(-1, BITS).to(torch.int64) << shifts).sum(-1).to(torch.int32)


def sign(bits: Tensor) -> Tensor:
    """float32: 1 for the bit 0, -1 for the bit 1 (int32)."""
    return (1 - 2 * bits).to(torch.float32)


def uniform(blocks: Tensor, tensors: Tensor, shared: Tensor) -> Tensor:
    return _interleave([_top24(word).to(torch.float32) * _UNIT for word in _run(blocks, tensors, shared)])


def normal(blocks: Tensor, tensors: Tensor, shared: Tensor) -> Tensor:
    w0, w1, w2, w3 = _run(blocks, tensors, shared)
    return _interleave([*_box_muller(w0, w1), *_box_muller(w2, w3)])


def _top24(word: Tensor) -> Tensor:
    return (word >> 8) & 0xFFFFFF


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(_minus_two_log(_top24(radius_word) + 1))  # of (0, 1]: the logarithm is finite
    cosine, sine = _unit_vector(_top24(angle_word))
    return radius * cosine, radius * sine


def _minus_two_log(numerator: Tensor) -> Tensor:
    """-2 log(numerator / 2**24) for 1 <= numerator <= 2**24, to a relative 1e-7.

    The float is split into 2**e (1 + x) with 1 + x in [sqrt(1/2), sqrt(2)); the polynomial is that of `logf` in
    Moshier's Cephes library. Inline arithmetic: a call into a mathematics library would spill every vector register.
    """
    bits = numerator.to(torch.float32).view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    x = (bits - (exponent << 23)).view(torch.float32) - 1
    square = x * x
    series = LOG_SERIES[0] * x + LOG_SERIES[1]
    for coefficient in LOG_SERIES[2:]:
        series = series * x + coefficient
    power = (exponent - 24).to(torch.float32)
    tail = series * x * square + power * LOG_2[1] - 0.5 * square
    return -2.0 * (x + tail + power * LOG_2[0])


def _unit_vector(turn: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi turn / 2**24, to 1e-7: one polynomial each, on an eighth of a turn either side.

    The upper two bits choose the quadrant, so the range reduction is exact and costs nothing.
    """
    quadrant, rest = turn >> 22, (turn & 0x3FFFFF) - 2**21
    x = rest.to(torch.float32) * (math.pi / 2 * 2.0**-22)
    y = x * x
    sine = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    cosine = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    first, second = (cosine - sine) * math.sqrt(0.5), (cosine + sine) * math.sqrt(0.5)  # an eighth of a turn on
    odd = (quadrant & 1) == 1
    a, b = torch.where(odd, -second, first), torch.where(odd, first, second)
    half = quadrant >= 2
    return torch.where(half, -a, a), torch.where(half, -b, b)


DTYPES: dict[Kernel, torch.dtype] = {words: torch.int32, uniform: torch.float32, normal: torch.float32}
"""Element type of each kernel's result."""
