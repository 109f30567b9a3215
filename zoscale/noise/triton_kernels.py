"""Triton kernels of the passes over weights: z is made in registers, each value is read and written once.

The numbers are those of `philox.py`: signs and words bit for bit, normals to 1e-6 (their polynomials are contracted).
All other arithmetic is that of `fused.py`, operation by operation: launched with `enable_fp_fusion=False` it has the
bits of eager mode. Importing this needs Triton.

A slice has `n` elements, and its first one is element `skip` of the tensor's unit `unit`: the 128 elements whose signs
are one Philox block. `ALIGNED` says that all addresses, `skip` and `n` are multiples of 16, so that a thread takes its
values at once. Kernels are specialised on nothing else but whether there are masks and a `table`, whatever the sizes.
`low` and `high` are the seed, `lasts` (int32 [q]) and `rhos` (float32 [q]) the last counter words and factors of q
directions. `marks` (uint8 [q, stride], or None) are the rows and columns outside of which z is zero, from `mark` on, in
a matrix whose element (`row`, `column`) is the first one of the slice.

A launch may take slices of many tensors; those of the first are given. Then `table` (int64 [tensors, ENTRY]) has how
many elements after these each tensor's slices begin, its first program, and its numbers from `n` on; `owners` (int32
[programs]) has the tensor of each program.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import math
from typing import Any

import triton
import triton.language as tl

from zoscale.noise import philox

SIZE = 2048
"""Elements of one program."""
UNIT = 128
SLICES = 3
"""Most slices of a tensor."""
ENTRY = SLICES + 10
"""Numbers of a tensor in a table."""

_SLICES, _ENTRY = tl.constexpr(SLICES), tl.constexpr(ENTRY)
_SIZE = tl.constexpr(SIZE)
_BLOCKS = tl.constexpr(SIZE // 4)
_WORDS = tl.constexpr(SIZE // 32)
_UNITS = tl.constexpr(SIZE // UNIT)
_SQRT_HALF_BITS = tl.constexpr(philox.SQRT_HALF_BITS)
_LOG_2_HIGH, _LOG_2_LOW = tl.constexpr(philox.LOG_2[0]), tl.constexpr(philox.LOG_2[1])
_LOG_SERIES = tl.constexpr(philox.LOG_SERIES)
_RADIANS = tl.constexpr(math.pi / 2 * 2.0**-22)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_HALF_MIN = tl.constexpr(2.0**-14)
_CUTS_OFF = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter does not round to bfloat16


def _kernel(function: Any) -> Any:
    arguments = [name for name in function.__code__.co_varnames[: function.__code__.co_argcount] if name.islower()]
    return triton.jit(function, do_not_specialize=arguments, do_not_specialize_on_alignment=arguments)


@triton.jit
def _word(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def _interleaved(a, b, c, d, LENGTH: tl.constexpr):
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (LENGTH,))


@triton.jit
def _words(first, COUNT: tl.constexpr, tensor, step, last, low, high):
    """Philox4x32-10 of COUNT blocks from `first` on."""
    blocks = first + tl.arange(0, COUNT).to(tl.uint32)
    return tl.philox_impl(blocks, _word(tensor), _word(step), _word(last), _word(low), _word(high))


@triton.jit
def _minus_two_log(numerator):
    bits = numerator.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1
    square = x * x
    series = tl.fma(x, _LOG_SERIES[0], _LOG_SERIES[1])
    for i in tl.static_range(2, 9):
        series = tl.fma(series, x, _LOG_SERIES[i])
    power = (exponent - 24).to(tl.float32)
    tail = tl.fma(series * x, square, tl.fma(power, _LOG_2_LOW, -0.5 * square))
    return -2.0 * (x + tl.fma(power, _LOG_2_HIGH, tail))


@triton.jit
def _box_muller(radius_word, angle_word):
    radius = tl.sqrt(_minus_two_log(((radius_word >> 8) + 1).to(tl.int32)))
    turn = (angle_word >> 8).to(tl.int32)
    quadrant, rest = turn >> 22, (turn & 0x3FFFFF) - 2097152
    x = rest.to(tl.float32) * _RADIANS
    y = x * x
    sine = x * tl.fma(y, tl.fma(y, tl.fma(y, tl.fma(y, 1 / 362880, -1 / 5040), 1 / 120), -1 / 6), 1.0)
    cosine = tl.fma(y, tl.fma(y, tl.fma(y, tl.fma(y, 1 / 40320, -1 / 720), 1 / 24), -1 / 2), 1.0)
    radius = radius * _SQRT_HALF
    first, second = radius * (cosine - sine), radius * (cosine + sine)  # an eighth of a turn on
    odd = (quadrant & 1) == 1
    a, b = tl.where(odd, -second, first), tl.where(odd, first, second)
    half = quadrant >= 2
    return tl.where(half, -a, a), tl.where(half, -b, b)


@triton.jit
def _normals(unit, tensor, step, last, low, high):
    w0, w1, w2, w3 = _words(unit * 32, _BLOCKS, tensor, step, last, low, high)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return _interleaved(z0, z1, z2, z3, _SIZE)


@triton.jit
def _signs(unit, tensor, step, last, low, high):
    w0, w1, w2, w3 = _words(unit, _UNITS, tensor, step, last, low, high)
    words = _interleaved(w0, w1, w2, w3, _WORDS)
    shifts = (31 - tl.arange(0, 32)).to(tl.uint32)
    bits = ((words[:, None] << shifts[None, :]) & 0x80000000) | 0x3F800000
    return tl.reshape(bits, (_SIZE,)).to(tl.float32, bitcast=True)


@triton.jit
def _z(NORMAL: tl.constexpr, unit, tensor, step, last, low, high):
    draw: tl.constexpr = _normals if NORMAL else _signs
    return draw(unit, tensor, step, last, low, high)


@triton.jit
def _entry(table, owners):
    """The program's tensor in the table."""
    return table if table is None else table + tl.load(owners + tl.program_id(0)) * _ENTRY


@triton.jit
def _slice(entry, pointer, NUMBER: tl.constexpr):
    """The slice of that number of the program's tensor."""
    return pointer if entry is None else pointer + tl.load(entry + NUMBER)


@triton.jit
def _number(entry, value, NUMBER: tl.constexpr):
    return value if entry is None else tl.load(entry + _SLICES + 1 + NUMBER).to(tl.int32)


@triton.jit
def _place(entry, n, skip, unit, tensor, ALIGNED: tl.constexpr):
    """The program's tensor and first unit, and the positions in the slice of its elements."""
    program = tl.program_id(0)
    if entry is not None:
        program -= tl.load(entry + _SLICES).to(tl.int32)
    n, skip, unit = _number(entry, n, 0), _number(entry, skip, 1), _number(entry, unit, 2)
    if ALIGNED:
        skip, n = skip // 16 * 16, n // 16 * 16  # says so
    here = program * _SIZE - skip + tl.arange(0, _SIZE)
    unit = _word(unit) + (program * _UNITS).to(tl.uint32)
    return _number(entry, tensor, 3), unit, here, (here >= 0) & (here < n)


@triton.jit
def _at(pointer, here, ALIGNED: tl.constexpr):
    return tl.multiple_of(pointer + here, 16) if ALIGNED else pointer + here


@triton.jit
def _masked(z, k, entry, here, inside, marks, stride, mark, rows, columns, row, column):
    """z where the k-th mask has the element's row and column, else 0."""
    if marks is not None:
        own = marks + k * stride + _number(entry, mark, 4)
        rows, columns = _number(entry, rows, 5), _number(entry, columns, 6)
        row, column = _number(entry, row, 7), _number(entry, column, 8)
        place = column + here
        in_row = tl.load(own + row + place // columns, mask=inside, other=0)
        z = tl.where(in_row & tl.load(own + rows + place % columns, mask=inside, other=0) != 0, z, 0.0)
    return z


@triton.jit
def _total(
    NORMAL: tl.constexpr, q, lasts, rhos, unit, tensor, step, low, high, entry, here, inside, marks, stride, mark, rows,
    columns, row, column,
):  # fmt: skip
    """sum_k rho_k z_k, and the number of z_k that are not zero."""
    total = tl.zeros((_SIZE,), tl.float32)
    visits = tl.zeros((_SIZE,), tl.float32)
    for k in range(q):
        z = _z(NORMAL, unit, tensor, step, tl.load(lasts + k), low, high)
        z = _masked(z, k, entry, here, inside, marks, stride, mark, rows, columns, row, column)
        total += z * tl.load(rhos + k)
        visits += tl.where(z != 0, 1.0, 0.0)
    return total, visits


@triton.jit
def _divided(total, q):
    if q > 1:  # a division costs more than the rest of a pass
        total = tl.div_rn(total, q.to(tl.float32))
    return total


@triton.jit
def _remembered(memory, total, visits, q, beta, rest):
    if q > 1:
        total = tl.div_rn(total, tl.maximum(visits, 1.0))
    return tl.where(visits > 0, total * rest + memory * beta, memory)


@triton.jit
def _store(pointer, x, inside):
    """Rounded to nearest."""
    if _CUTS_OFF and pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
    tl.store(pointer, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _stochastically_rounded(x, words, dtype: tl.constexpr):
    dropped: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (((bits + (words & ((1 << dropped) - 1))) >> dropped) << dropped).to(tl.float32, bitcast=True)
    if dtype == tl.float16:
        chance = (words & 0xFFFF).to(tl.float32) * 0.0000152587890625
        fine = tl.floor(x * 16777216.0 + chance) * 5.9604644775390625e-08
        rounded = tl.where(tl.abs(x) < _HALF_MIN, fine, rounded)
    return tl.where((bits & 0x7F800000) != 0x7F800000, rounded, x)


@triton.jit
def _descend(
    truth, live, here, inside, u, lr, weight_decay, unit, tensor, step, low, high, last_rounding, ALIGNED: tl.constexpr
):  # fmt: skip
    """See `fused.descend`; the words to round with are drawn here where there is a counter word for them."""
    x = tl.load(_at(truth, here, ALIGNED), mask=inside).to(tl.float32)
    x = x - (u + x * weight_decay) * lr
    if last_rounding is None or truth.dtype.element_ty == tl.float32:
        _store(_at(truth, here, ALIGNED), x, inside)
    else:
        w0, w1, w2, w3 = _words(unit * 32, _BLOCKS, tensor, step, last_rounding, low, high)
        words = _interleaved(w0, w1, w2, w3, _SIZE)
        rounded = _stochastically_rounded(x, words, truth.dtype.element_ty)
        _store(_at(truth, here, ALIGNED), rounded, inside)
    if live is not None:
        _store(_at(live, here, ALIGNED), x, inside)


@_kernel
def perturb(
    out, base, table, owners, n, skip, unit, tensor, step, low, high, marks, stride, mark, rows, columns, row,
    column, last, radius, NORMAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out = base + radius z."""
    entry = _entry(table, owners)
    out = _slice(entry, out, 0)
    base = _slice(entry, base, 1)
    tensor, unit, here, inside = _place(entry, n, skip, unit, tensor, ALIGNED)
    z = _z(NORMAL, unit, tensor, step, last, low, high)
    z = _masked(z, 0, entry, here, inside, marks, stride, mark, rows, columns, row, column)
    x = tl.load(_at(base, here, ALIGNED), mask=inside).to(tl.float32)
    _store(_at(out, here, ALIGNED), tl.where(z != 0, x + z * radius, x), inside)


@_kernel
def mean(
    out, table, owners, n, skip, unit, tensor, step, low, high, marks, stride, mark, rows, columns, row,
    column, q, lasts, rhos, NORMAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out = (1/q) sum_k rho_k z_k."""
    entry = _entry(table, owners)
    out = _slice(entry, out, 0)
    tensor, unit, here, inside = _place(entry, n, skip, unit, tensor, ALIGNED)
    total, _ = _total(
        NORMAL, q, lasts, rhos, unit, tensor, step, low, high, entry, here, inside, marks, stride, mark, rows, columns,
        row, column,
    )  # fmt: skip
    tl.store(_at(out, here, ALIGNED), _divided(total, q), mask=inside)


@_kernel
def descend(
    truth, live, table, owners, n, skip, unit, tensor, step, low, high, marks, stride, mark, rows, columns, row,
    column, q, lasts, rhos, lr, weight_decay, last_rounding, NORMAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`fused.descend` along (1/q) sum_k rho_k z_k."""
    entry = _entry(table, owners)
    truth = _slice(entry, truth, 0)
    if live is not None:
        live = _slice(entry, live, 1)
    tensor, unit, here, inside = _place(entry, n, skip, unit, tensor, ALIGNED)
    total, _ = _total(
        NORMAL, q, lasts, rhos, unit, tensor, step, low, high, entry, here, inside, marks, stride, mark, rows, columns,
        row, column,
    )  # fmt: skip
    u = _divided(total, q)
    _descend(truth, live, here, inside, u, lr, weight_decay, unit, tensor, step, low, high, last_rounding, ALIGNED)


@_kernel
def remember(
    memory, table, owners, n, skip, unit, tensor, step, low, high, marks, stride, mark, rows, columns, row,
    column, q, lasts, rhos, beta, rest, NORMAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`fused.remember_mean` of rho_k z_k."""
    entry = _entry(table, owners)
    memory = _slice(entry, memory, 0)
    tensor, unit, here, inside = _place(entry, n, skip, unit, tensor, ALIGNED)
    total, visits = _total(
        NORMAL, q, lasts, rhos, unit, tensor, step, low, high, entry, here, inside, marks, stride, mark, rows, columns,
        row, column,
    )  # fmt: skip
    m = _remembered(tl.load(_at(memory, here, ALIGNED), mask=inside), total, visits, q, beta, rest)
    tl.store(_at(memory, here, ALIGNED), m, mask=inside)


@_kernel
def remember_and_descend_sign(
    memory, truth, live, table, owners, n, skip, unit, tensor, step, low, high, marks, stride, mark, rows, columns, row,
    column, q, lasts, rhos, beta, rest, lr, weight_decay, last_rounding, NORMAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`remember`, then `fused.descend_sign` along the memory."""
    entry = _entry(table, owners)
    memory = _slice(entry, memory, 0)
    truth = _slice(entry, truth, 1)
    if live is not None:
        live = _slice(entry, live, 2)
    tensor, unit, here, inside = _place(entry, n, skip, unit, tensor, ALIGNED)
    total, visits = _total(
        NORMAL, q, lasts, rhos, unit, tensor, step, low, high, entry, here, inside, marks, stride, mark, rows, columns,
        row, column,
    )  # fmt: skip
    m = _remembered(tl.load(_at(memory, here, ALIGNED), mask=inside), total, visits, q, beta, rest)
    tl.store(_at(memory, here, ALIGNED), m, mask=inside)
    u = tl.where(m > 0, 1.0, 0.0) - tl.where(m < 0, 1.0, 0.0)
    _descend(truth, live, here, inside, u, lr, weight_decay, unit, tensor, step, low, high, last_rounding, ALIGNED)
