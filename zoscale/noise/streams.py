"""`Stream`: z on a part of a tensor as its coordinates, for kernels that make it in registers.

Only where Triton's kernels run: on a GPU, or on the CPU in Triton's interpreter (`TRITON_INTERPRET=1`, for tests).
Elsewhere z is drawn to memory by `generator.py`, which measures no slower on a CPU: there the arithmetic of the
generator costs, not the memory traffic.
"""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from zoscale.noise import philox
from zoscale.noise.fused import on_device
from zoscale.noise.generator import Domain, Key, Noise, Range

Distribution = Literal["normal", "rademacher"]
_ALIGNED = 16  # elements, and bytes


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

    def perturb(self, out: Tensor, base: Tensor, radius: float) -> None:
        """See `fused.perturb`: out = base + radius z, two slices of this length."""
        _launch("perturb", self, (out, base), _marks([self]), (_word(self.key), radius))


def _launch(
    name: str, stream: Stream, slices: Sequence[Tensor | None], marks: Tensor | None, rest: Sequence[Any]
) -> None:
    """Run a kernel on slices of a stream's length.

    Args:
        name: of the kernel.
        stream: where the slices lie in their tensor, and their step.
        slices: its first arguments.
        marks: of the masks of its directions, uint8 [q, rows + columns]; None = there are none.
        rest: those after the place of the slices.
    """
    if not len(stream):
        return
    kernels, start, seed = stream.kernels, stream.range.start, stream.noise.seed
    skip = start % kernels.UNIT
    words = (start // kernels.UNIT, stream.range.tensor, stream.key.step, seed & 0xFFFFFFFF, seed >> 32)
    addresses = (part.data_ptr() for part in slices if part is not None)
    is_aligned = not any(number % _ALIGNED for number in (*addresses, skip, len(stream)))
    variant = {"NORMAL": stream.distribution == "normal", "ALIGNED": is_aligned}
    rows, columns = (stream.mask.rows, stream.mask.columns) if stream.mask is not None else (1, 1)
    mask = (marks, rows, columns, start // columns, start % columns) if marks is not None else (None, 1, 1, 0, 0)
    place = (len(stream), skip, *map(philox.signed, words), *mask)
    programs = -(-(skip + len(stream)) // kernels.SIZE)
    with torch.cuda.device_of(slices[0]):  # type: ignore[no-untyped-call]
        getattr(kernels, name)[programs,](*slices, *place, *rest, **variant, enable_fp_fusion=False)


def _marks(streams: Sequence[Stream]) -> Tensor | None:
    """Those of the streams' masks: uint8 [q, rows + columns]; None if z is zero nowhere."""
    marks = [stream.mask.marks for stream in streams if stream.mask is not None]
    return (marks[0].view(1, -1) if len(marks) == 1 else torch.stack(marks)) if marks else None


@dataclass(frozen=True)
class Sum:
    """(1/q) sum_k rho_k z_k, every z_k a stream on the same elements.

    Args:
        streams: of one step, distribution and range.
        rhos: float32 factors.
    """

    streams: Sequence[Stream]
    rhos: tuple[float, ...]

    @classmethod
    def of(cls, streams: Sequence[Stream | None], rhos: tuple[float, ...]) -> "Sum | None":
        """The sum, if all are streams that differ in their direction alone."""
        found = [stream for stream in streams if stream is not None]
        kinds = {(id(z.noise), z.key.step, z.distribution, z.mask is None) for z in found}
        return cls(found, rhos) if len(found) == len(streams) and len(kinds) == 1 else None

    def mean(self) -> Tensor:
        """Its values: float32."""
        out = torch.empty(len(self.streams[0]), device=self.streams[0].device)
        self._run("mean", (out,))
        return out

    def descend(self, truth: Tensor, live: Tensor | None, lr: float, weight_decay: float, *, rounded: bool) -> None:
        """`fused.descend` along it; `rounded`: stochastically, by words that are drawn in the same pass."""
        self._run("descend", (truth, live), lr, weight_decay, self._rounding(rounded))

    def remember(self, memory: Tensor, beta: float) -> None:
        """`fused.remember_mean` of its terms."""
        self._run("remember", (memory,), beta, 1 - beta)

    def remember_and_descend_sign(
        self, memory: Tensor, beta: float, truth: Tensor, live: Tensor | None, lr: float, weight_decay: float,
        *, rounded: bool,
    ) -> None:  # fmt: skip
        """`remember`, then `fused.descend_sign` along the memory, in one pass."""
        rest = (beta, 1 - beta, lr, weight_decay, self._rounding(rounded))
        self._run("remember_and_descend_sign", (memory, truth, live), *rest)

    def _rounding(self, rounded: bool) -> int | None:
        return _word(Key(self.streams[0].key.step, domain=Domain.ROUNDING)) if rounded else None

    def _run(self, kernel: str, slices: Sequence[Tensor | None], *rest: Any) -> None:
        first = self.streams[0]
        words = tuple(_word(stream.key) for stream in self.streams)
        settings = (len(words), *_tables(words, self.rhos, first.device), *rest)
        _launch(kernel, first, slices, _marks(self.streams), settings)


@functools.lru_cache(maxsize=8)
def _tables(words: tuple[int, ...], rhos: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Counter words (int32 [q]) and factors (float32 [q]) of a step, in one transfer."""
    factors = torch.tensor(rhos, dtype=torch.float32).view(torch.int32)
    both = on_device(torch.cat([torch.tensor(words, dtype=torch.int32), factors]), device)
    return both[: len(words)], both[len(words) :].view(torch.float32)


def _word(key: Key) -> int:
    return philox.signed(key.direction | key.domain << 24)


def stream_of(
    noise: Noise,
    key: Key,
    wanted: Range,
    distribution: Distribution,
    device: torch.device,
    mask: Callable[[], Mask | None] = lambda: None,
) -> Stream | None:
    """The stream, or None where it must be drawn to memory; the mask is only asked for with a stream."""
    kernels = kernels_on(device) if noise.compiled else None
    return None if kernels is None else Stream(noise, key, wanted, distribution, device, kernels, mask())


def drawn(streams: Sequence[Stream]) -> list[Tensor]:
    """The values of streams of one direction, in one pass of the generator: float32 each."""
    if not streams:
        return []
    first = streams[0]
    draw = first.noise.normal if first.distribution == "normal" else first.noise.rademacher
    values = draw(first.key, [stream.range for stream in streams], first.device)
    masks = [None if stream.mask is None else stream.mask.on(stream.range) for stream in streams]
    return [z if mask is None else torch.where(mask, z, 0.0) for z, mask in zip(values, masks, strict=True)]


@functools.cache
def kernels_on(device: torch.device) -> Any:
    """`triton_kernels`, where it gives the right numbers on the device; else None, with one warning on a GPU."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from zoscale.noise import triton_kernels

        _check(triton_kernels, device)
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        warnings.warn(f"noise is drawn to memory, slower: Triton's kernels cannot be used: {reason[0]}", stacklevel=3)
        return None
    return triton_kernels


def _check(kernels: Any, device: torch.device) -> None:
    """Compare a few numbers of every kernel and distribution with those of `generator.py`.

    Raises:
        RuntimeError: if they differ.
    """
    for first in (2**33 + 77, 2**33):  # aligned, as most slices are, and not
        _check_range(kernels, device, Range(7, first, first + 304))


def _check_range(kernels: Any, device: torch.device, wanted: Range) -> None:
    noise, key = Noise(2**63 + 5), Key(2**31 + 1, 3)
    normal, signs = (Stream(noise, key, wanted, kind, device, kernels) for kind in get_args(Distribution))
    marks = (torch.arange(20 + 23, device=device) % 3 != 0).to(torch.uint8)
    masked = replace(signs, range=Range(7, 77, 77 + len(signs)), mask=Mask(marks, 20, 23))
    zeros, normals, made, cut, mean, memory, truth, again, both = torch.zeros(9, len(signs), device=device)
    halves = torch.zeros(2, len(signs), device=device, dtype=torch.bfloat16)
    normal.perturb(normals, zeros, 1.0)
    signs.perturb(halves[0], halves[1], 1.0)
    signs.perturb(made, zeros, 1.0)
    masked.perturb(cut, zeros, 1.0)
    one = Sum((signs,), (1.0,))
    mean.copy_(one.mean())
    one.remember(memory, 0.0)
    one.descend(truth, None, -1.0, 0.0, rounded=False)
    one.remember_and_descend_sign(again, 0.0, both, None, -1.0, 0.0, rounded=False)
    if not torch.allclose(normals, drawn([normal])[0], rtol=1e-6, atol=1e-6):
        raise RuntimeError("expected the normals of philox.py, got others")
    found = (halves[0].float(), made, mean, memory, truth, again, both)
    if not (all(torch.equal(own, drawn([signs])[0]) for own in found) and torch.equal(cut, drawn([masked])[0])):
        raise RuntimeError("expected the signs of philox.py, got others")
