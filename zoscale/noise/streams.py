"""`Stream`: z on a part of a tensor as its coordinates, for kernels that make it in registers.

Only where Triton's kernels run: on a GPU, or on the CPU in Triton's interpreter (`TRITON_INTERPRET=1`, for tests).
Elsewhere z is drawn to memory by `generator.py`, which measures no slower on a CPU: there the arithmetic of the
generator costs, not the memory traffic.
"""

import functools
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
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

    @property
    def kind(self) -> tuple[Any, ...]:
        """Streams of one kind may be used together."""
        return id(self.noise), self.key, self.distribution, self.mask is None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the mask."""
        return (self.mask.rows, self.mask.columns) if self.mask is not None else (0, 0)


Slices = tuple[Tensor | None, ...]
"""Of one stream's length each."""


def perturb_all(streams: Sequence[Stream], slices: Sequence[Slices], radius: float) -> None:
    """`fused.perturb` of many tensors, a launch for all streams of one kind.

    Args:
        streams: of one direction.
        slices: of each, `out` and `base`.
        radius: signed smoothing radius.
    """
    for numbers in alike(stream.kind for stream in streams):
        some = [streams[number] for number in numbers]
        rest = (_word(some[0].key), radius)
        _launch("perturb", [[stream] for stream in some], [slices[number] for number in numbers], rest)


@dataclass(frozen=True)
class Sum:
    """(1/q) sum_k rho_k z_k on slices of one tensor or several: what is done along it takes one launch.

    Args:
        streams: of each tensor q, on the same elements. The k-th ones are of one kind.
        rhos: float32 factors.
    """

    streams: Sequence[Sequence[Stream]]
    rhos: tuple[float, ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Sums of one kind can be joined."""
        return tuple(stream.kind for stream in self.streams[0])

    @classmethod
    def of(cls, streams: Sequence[Stream | None], rhos: tuple[float, ...]) -> "Sum | None":
        """The sum on one tensor, if all are streams that differ in their direction alone."""
        found = [stream for stream in streams if stream is not None]
        kinds = {(id(z.noise), z.key.step, z.distribution, z.mask is None) for z in found}
        return cls([found], rhos) if len(found) == len(streams) and len(kinds) == 1 else None

    @classmethod
    def joined(cls, sums: "Sequence[Sum]") -> "Sum":
        """Sums of one kind, as one."""
        return cls([streams for own in sums for streams in own.streams], sums[0].rhos)

    def mean(self) -> list[Tensor]:
        """Its values on each tensor: float32."""
        outs = [torch.empty(len(first), device=first.device) for first, *_ in self.streams]
        self._run("mean", [outs])
        return outs

    def descend(
        self, truths: Sequence[Tensor], lives: Sequence[Tensor | None], lr: float, weight_decay: float, *, rounded: bool
    ) -> None:
        """`fused.descend` along it; `rounded`: a truth of 16 bits stochastically, by words drawn in the same pass."""
        self._run("descend", [truths, lives], lr, weight_decay, self._rounding(rounded))

    def remember(self, memories: Sequence[Tensor], beta: float) -> None:
        """`fused.remember_mean` of its terms."""
        self._run("remember", [memories], beta, 1 - beta)

    def remember_and_descend_sign(
        self, memories: Sequence[Tensor], beta: float, truths: Sequence[Tensor], lives: Sequence[Tensor | None],
        lr: float, weight_decay: float, *, rounded: bool,
    ) -> None:  # fmt: skip
        """`remember`, then `fused.descend_sign` along the memory, in one pass."""
        rest = (beta, 1 - beta, lr, weight_decay, self._rounding(rounded))
        self._run("remember_and_descend_sign", [memories, truths, lives], *rest)

    def _rounding(self, rounded: bool) -> int | None:
        return _word(Key(self.streams[0][0].key.step, domain=Domain.ROUNDING)) if rounded else None

    def _run(self, kernel: str, slices: Sequence[Sequence[Tensor | None]], *rest: Any) -> None:
        first = self.streams[0]
        words = tuple(_word(stream.key) for stream in first)
        settings = (len(words), *_tables(words, self.rhos, first[0].device), *rest)
        _launch(kernel, self.streams, list(zip(*slices, strict=True)), settings)


def alike(kinds: Iterable[Hashable]) -> list[list[int]]:
    """The numbers of those that are equal, together."""
    found: dict[Hashable, list[int]] = {}
    for number, kind in enumerate(kinds):
        found.setdefault(kind, []).append(number)
    return list(found.values())


def _launch(name: str, streams: Sequence[Sequence[Stream]], slices: Sequence[Slices], rest: Sequence[Any]) -> None:
    """Run a kernel once for all tensors whose slices have the same types.

    Args:
        name: of the kernel.
        streams: of each tensor, one per direction.
        slices: of each tensor, the first arguments.
        rest: the last ones.
    """
    types = [tuple(part if part is None else part.dtype for part in parts) for parts in slices]
    for numbers in alike(types):
        own = [number for number in numbers if len(streams[number][0])]
        if own:
            _launch_alike(name, [streams[number] for number in own], [slices[number] for number in own], rest)


def _launch_alike(
    name: str, streams: Sequence[Sequence[Stream]], slices: Sequence[Slices], rest: Sequence[Any]
) -> None:
    first = streams[0][0]
    kernels, seed = first.kernels, first.noise.seed
    marks, begins = _marks(streams)
    rows = tuple(
        (own[0].range, own[0].shape, begin, *(0 if part is None else part.data_ptr() for part in parts))
        for own, begin, parts in zip(streams, begins, slices, strict=True)
    )
    programs, is_aligned, place, table, owners = _laid_out(
        (kernels.UNIT, kernels.SIZE, kernels.SLICES), rows, first.device
    )
    words = map(philox.signed, (first.key.step, seed & 0xFFFFFFFF, seed >> 32))
    stride = 0 if marks is None else marks.shape[1]
    arguments = (*slices[0], table, owners, *place[:4], *words, marks, stride, *place[4:], *rest)
    variant = {"NORMAL": first.distribution == "normal", "ALIGNED": is_aligned}
    with torch.cuda.device_of(slices[0][0]):  # type: ignore[no-untyped-call]
        getattr(kernels, name)[programs,](*arguments, **variant, enable_fp_fusion=False)


@functools.lru_cache(maxsize=256)
def _laid_out(
    sizes: tuple[int, int, int], rows: tuple[Any, ...], device: torch.device
) -> tuple[int, bool, tuple[int, ...], Tensor | None, Tensor | None]:
    """Programs, whether all is aligned, the place of the first tensor, and the `table` and `owners` of several.

    Most are the same step after step.

    Args:
        sizes: UNIT, SIZE and SLICES of the kernels.
        rows: of each tensor the range, rows and columns, where its marks begin, and the addresses of its slices.
        device: of the slices.
    """
    unit, size, most = sizes
    places = [_place(unit, *row[:3]) for row in rows]
    counts = [-(-(skip + n) // size) for n, skip, *_ in places]
    numbers = [number for (n, skip, *_), row in zip(places, rows, strict=True) for number in (n, skip, *row[3:])]
    is_aligned = not any(number % _ALIGNED for number in numbers)
    if len(rows) == 1:
        return counts[0], is_aligned, places[0], None, None
    starts = accumulate(counts[:-1], initial=0)
    table = [
        (*row[3:], *(0,) * (most - len(row[3:])), start, *place)
        for row, start, place in zip(rows, starts, places, strict=True)
    ]
    owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    return sum(counts), is_aligned, places[0], on_device(torch.tensor(table), device), on_device(owners, device)


def _place(unit: int, wanted: Range, shape: tuple[int, int], mark: int) -> tuple[int, ...]:
    """Where the elements lie in their tensor, as the kernels have it."""
    first, skip = divmod(wanted.start, unit)
    row, column = divmod(wanted.start, shape[1]) if shape[1] else (0, 0)
    return wanted.stop - wanted.start, skip, first, philox.signed(wanted.tensor), mark, *shape, row, column


def _marks(streams: Sequence[Sequence[Stream]]) -> tuple[Tensor | None, list[int]]:
    """Those of the masks: uint8 [q, stride], None if z is zero nowhere; and where each tensor's begin."""
    if streams[0][0].mask is None:
        return None, [0] * len(streams)
    marks = [stream.mask.marks for own in zip(*streams, strict=True) for stream in own if stream.mask is not None]
    begins = accumulate(map(len, marks[: len(streams) - 1]), initial=0)
    whole = marks[0] if len(marks) == 1 else torch.cat(marks)
    return whole.view(len(streams[0]), -1), list(begins)


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
    zeros, normals, made, other, cut, mean, memory, truth, again, both = torch.zeros(10, len(signs), device=device)
    halves = torch.zeros(2, len(signs), device=device, dtype=torch.bfloat16)
    perturb_all([normal], [(normals, zeros)], 1.0)
    perturb_all([signs] * 3, [(halves[0], halves[1]), (made, zeros), (other, zeros)], 1.0)
    perturb_all([masked], [(cut, zeros)], 1.0)
    one = Sum([[signs]], (1.0,))
    mean.copy_(one.mean()[0])
    one.remember([memory], 0.0)
    one.descend([truth], [None], -1.0, 0.0, rounded=False)
    one.remember_and_descend_sign([again], 0.0, [both], [None], -1.0, 0.0, rounded=False)
    if not torch.allclose(normals, drawn([normal])[0], rtol=1e-6, atol=1e-6):
        raise RuntimeError("expected the normals of philox.py, got others")
    found = (halves[0].float(), made, other, mean, memory, truth, again, both)
    if not (all(torch.equal(own, drawn([signs])[0]) for own in found) and torch.equal(cut, drawn([masked])[0])):
        raise RuntimeError("expected the signs of philox.py, got others")
