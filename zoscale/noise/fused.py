"""Arithmetic on slices of weights that touches each value once: plain tensor functions, and `compiled` to fuse them.

In eager mode they are the definition. Compiled, they are one pass each (vector C++ on the CPU, Triton on the GPU) with
the same bits: every operation is rounded on its own, as in eager mode. All slices are 1-D and of one length n, as
the direction z on them (float32). Or they are [n / 32, 32], and z is signs as bits: int32 [1, n / 32], or [2, n / 32]
with a mask, see `philox.signs`.
"""

import functools
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from zoscale.noise import philox

Function = TypeVar("Function", bound=Callable[..., Any])

Options = dict[str, str | int | bool | Callable[..., Any]]
"""Of torch's compiler."""

_EAGER_NUMERICS: Options = {
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
}
"""No product and sum are contracted, no division is approximated: bits depend on no vector width.

A graph must not read again what it has rounded to 16 bits: torch before 2.13 forgets the rounding.
"""
_ONE_LOOP: Options = dict.fromkeys(
    ("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold"), 2**10
)
"""What several results need is computed where each of them is: kept in memory for them, it may part their loops."""
_SMALLEST = 2  # sizes 0 and 1 would have graphs of their own
_WORTH = 2**14  # elements from which one pass is faster than operators one by one: a compiled call costs 50 us
_HALF_MIN = 2.0**-14  # smallest normal number of float16; below it, numbers are 2**-24 apart


def perturb(out: Tensor, base: Tensor, z: Tensor, radius: Tensor) -> None:
    """out = base + radius * z, rounded once to the type of `out`.

    Args:
        out, base: of any floating type.
        z: a direction.
        radius: from `scalars`.
    """
    out.copy_(base.float() + _values(z, out.dtype) * radius)


def accumulate(total: Tensor, z: Tensor, rho: Tensor) -> None:
    """total += rho * z, in float32."""
    total.add_(_values(z) * rho)


def visit(total: Tensor, visits: Tensor, z: Tensor, rho: Tensor) -> None:
    """`accumulate`, and visits += 1 where z is not zero."""
    z = _values(z)
    total.add_(z * rho)
    visits.add_(z != 0)


def remember(memory: Tensor, z: Tensor, rho: Tensor, beta: Tensor, rest: Tensor) -> None:
    """memory = beta memory + (1 - beta) rho z where z is not zero, in float32; `rest` is 1 - beta."""
    z = _values(z)
    memory.copy_(torch.where(z != 0, memory * beta + z * rho * rest, memory))


def remember_mean(memory: Tensor, total: Tensor, visits: Tensor, beta: Tensor, rest: Tensor) -> None:
    """memory = beta memory + (1 - beta) total / visits where visits > 0, in float32; `rest` is 1 - beta."""
    mixed = (total / visits.clamp(min=1)).mul_(rest).add_(memory * beta)
    memory.copy_(torch.where(visits > 0, mixed, memory))


def remember_signs(memory: Tensor, z: Tensor, beta: Tensor, rest: Tensor, *rhos: Tensor) -> None:
    """`visit` with each direction and its rho, and `remember_mean` of the sum.

    Args:
        memory: float32 [n / 32, 32].
        z: every direction as bits, int32 [q, 2, n / 32].
        beta, rest, rhos: from `scalars`; `rest` is 1 - beta.
    """
    total, visits = torch.zeros_like(memory), torch.zeros_like(memory)
    for signs, rho in zip(z.unbind(), rhos, strict=True):
        visit(total, visits, signs, rho)
    remember_mean(memory, total, visits, beta, rest)


def descend(
    truth: Tensor, live: Tensor | None, update: Tensor, lr: Tensor, weight_decay: Tensor, words: Tensor | None
) -> None:
    """x = truth - lr (update + weight_decay truth) in float32, rounded to the truth and to the live slice.

    Args:
        truth, live: of any floating type; None = there is only the truth.
        update: float32.
        lr, weight_decay: from `scalars`.
        words: random words (int32) to round a 16-bit truth stochastically with; None = to nearest.
    """
    x = truth.float()
    x = x - (update + x * weight_decay) * lr
    truth.copy_(x if words is None else stochastically_rounded(x, words, truth.dtype))
    if live is not None:
        live.copy_(x)


def descend_sign(
    truth: Tensor, live: Tensor | None, memory: Tensor, lr: Tensor, weight_decay: Tensor, words: Tensor | None
) -> None:
    """`descend` along the sign of a memory (float32); sign(0) = 0."""
    descend(truth, live, memory.sign(), lr, weight_decay, words)


def remember_and_descend_sign(
    memory: Tensor, truth: Tensor, live: Tensor | None, words: Tensor | None, z: Tensor, rho: Tensor, beta: Tensor,
    rest: Tensor, lr: Tensor, weight_decay: Tensor,
) -> None:  # fmt: skip
    """`remember`, then `descend_sign` along the memory."""
    remember(memory, z, rho, beta, rest)
    descend_sign(truth, live, memory, lr, weight_decay, words)


def remember_signs_and_descend_sign(
    memory: Tensor, truth: Tensor, live: Tensor | None, words: Tensor | None, z: Tensor, beta: Tensor, rest: Tensor,
    lr: Tensor, weight_decay: Tensor, *rhos: Tensor,
) -> None:  # fmt: skip
    """`remember_signs`, then `descend_sign` along the memory."""
    remember_signs(memory, z, beta, rest, *rhos)
    descend_sign(truth, live, memory, lr, weight_decay, words)


def _values(z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """z in float32, for results of a type."""
    if z.dtype != torch.int32:
        return z
    is_by_choice = dtype != torch.float32 and torch.compiler.is_compiling()
    return (philox.chosen_signs if is_by_choice else philox.signs)(*z.unbind())


def stochastically_rounded(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers that `dtype` holds, one of the two next to x, with x as the mean (unless beyond the largest).

    Bits below the last one kept are compared with random ones (Gupta et al., arXiv 1502.02551).

    Args:
        x: float32.
        words: int32, uniform.
        dtype: bfloat16 or float16; others leave x as it is.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return x
    dropped = 16 if dtype == torch.bfloat16 else 13
    below = (1 << dropped) - 1
    bits = x.view(torch.int32)
    rounded = ((bits + (words & below)) & ~below).view(torch.float32)
    finite = (bits & 0x7F800000) != 0x7F800000
    if dtype == torch.float16:
        chance = (words & 0xFFFF).float() * 2.0**-16
        rounded = torch.where(x.abs() < _HALF_MIN, (x * 2.0**24 + chance).floor() * 2.0**-24, rounded)
    return torch.where(finite, rounded, x)


def scalars(*values: float) -> tuple[Tensor, ...]:
    """Numbers as float32 tensors: not constants of a graph, so that other values need no other graph.

    They have no dimension and lie on the CPU, which is how a number becomes an argument of a kernel on any device:
    nothing is transferred and nobody waits. They are shared by all calls with these values: not to be changed.
    """
    return _scalars(struct.pack(f"{len(values)}d", *values))


@functools.lru_cache(256)
def _scalars(content: bytes) -> tuple[Tensor, ...]:
    """By their bits: 0.0 and -0.0 are two numbers."""
    return torch.frombuffer(bytearray(content), dtype=torch.float64).float().unbind()


def on_device(values: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device, in the order of its other work: the CPU does not wait for what it sends there.

    Values that do not lie one after the other would be put together in memory that is not pinned, and waited for.
    """
    if values.device.type != "cpu" or torch.device(device).type != "cuda":
        return values.to(device)
    return values.contiguous().pin_memory().to(device, non_blocking=True)


@functools.cache
def compiled(function: Function, smallest: int = _SMALLEST, *, in_one_loop: bool = False) -> Function:
    """The function under torch.compile (one graph for all sizes), or itself, with one warning, where that fails.

    A machine may have a compiler for its GPU and none for its CPU, on which few numbers of a step are drawn.

    Args:
        function: of tensors; those that it changes in place do not overlap, but one may be given twice.
        smallest: elements of the first from which the graph is called.
        in_one_loop: compute what several results need anew for each; not for rounds that all need the last one twice.
    """
    found: dict[str, Callable[..., Any]] = {}
    beyond: set[tuple[Any, ...]] = set()  # combinations of types after as many as torch compiles

    @torch.no_grad()  # a graph is bound to the mode
    def call(*inputs: Any) -> Any:
        kind = inputs[0].device.type
        types = kind, *(getattr(value, "dtype", None) for value in inputs)
        if inputs[0].numel() < smallest or types in beyond:
            return function(*inputs)
        if kind not in found:
            found[kind] = _compile(function, inputs, _EAGER_NUMERICS | (_ONE_LOOP if in_one_loop else {}))
        bare = {id(value): value.data for value in inputs if isinstance(value, Tensor)}
        try:  # not as views: a graph would be bound to the shape of what they are views of
            return found[kind](*(bare.get(id(value), value) for value in inputs))
        except Exception as error:
            if type(error).__name__ != "FailOnRecompileLimitHit":
                raise
            beyond.add(types)
            return function(*inputs)

    return cast(Function, call)


def _compile(function: Function, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compiled for copies of some inputs, which shows whether there is a compiler."""
    try:
        fused: Callable[..., Any] = torch.compile(function, dynamic=True, fullgraph=True, options=options)
        fused(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        warnings.warn(
            f"noise runs in eager mode, several times slower: torch.compile failed: {reason[0]}", stacklevel=4
        )
        return function
    return fused


def chosen(function: Function, is_compiled: bool) -> Function:
    """A function of slices, fused where that is faster, or as it is."""
    return compiled(function, _WORTH, in_one_loop=True) if is_compiled else function
