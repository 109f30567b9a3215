"""`Segment`: a direction z on a part of a tensor, and what is done with it there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor

from zoscale.noise import philox
from zoscale.noise.fused import (
    accumulate,
    chosen,
    perturb,
    remember,
    remember_and_descend_sign,
    remember_signs,
    remember_signs_and_descend_sign,
    scalars,
    visit,
)
from zoscale.noise.streams import Stream, drawn, perturb_all


@dataclass(frozen=True)
class Segment:
    """A direction z on elements [start, start + n) of a tensor.

    Args:
        source: z: float32 [n] (dense), or float32 [s] at `index` (zero elsewhere); signs as bits (dense), see
            `fused.py`; or the stream to make it of (dense).
        index: int64 [s], positions relative to start, distinct; None = every element.
        is_compiled: whether its arithmetic is fused by a compiler, like the noise it is made of.
    """

    source: Tensor | Stream
    index: Tensor | None = None
    is_compiled: bool = False

    @property
    def value(self) -> Tensor:
        """z in float32; a stream is drawn anew each time."""
        return values([self])[0]

    def place(self, start: int) -> slice | Tensor:
        """Where it acts in a tensor of which its own element 0 is element `start`."""
        if self.index is not None:
            return self.index + start
        if isinstance(self.source, Tensor) and _is_bits(self.source):
            return slice(start, start + philox.BITS * self.source.shape[1])
        return slice(start, start + len(self.source))

    def write(self, live: Tensor, truth: Tensor, start: int, radius: float) -> None:
        """live = truth + radius * z from `start` on, rounded once from fp32 to the type of `live`.

        Args:
            live, truth: 1-D, of one length.
            start: where the segment begins.
            radius: signed smoothing radius.
        """
        where = self.place(start)
        if self.index is None:
            out = live[where]
            base = out if live is truth else truth[where]
            if isinstance(self.source, Stream):
                perturb_all([self.source], [(out, base)], radius)
            else:
                self.run(perturb, (out, base), radius)
        else:
            live[where] = (truth[where].float() + self.value * radius).to(live.dtype)

    def add_to(self, total: Tensor, scale: float) -> None:
        """total += scale * z, as one float32 multiplication and one addition per element."""
        if self.index is None:
            self.run(accumulate, (total,), scale)
        else:
            total[self.index] = total[self.index] + self.value * scale

    def visit(self, total: Tensor, visits: Tensor, scale: float) -> None:
        """`add_to`, and one more visit where z is not zero."""
        if self.index is None:
            self.run(visit, (total, visits), scale)
        else:
            self.add_to(total, scale)
            visits[self.index] += 1

    def remember(self, memory: Tensor, rho: float, beta: float) -> None:
        """memory = beta memory + (1 - beta) rho z where z is not zero; only that is read and written."""
        if self.index is None:
            self.run(remember, (memory,), rho, beta, 1 - beta)
        else:
            memory[self.index] = memory[self.index] * beta + self.value * rho * (1 - beta)

    def run(self, function: Callable[..., None], slices: Sequence[Tensor | None], *numbers: float) -> None:
        """A function of `fused.py` on slices of this length, z (dense) and numbers."""
        z = self.value if isinstance(self.source, Stream) else self.source
        slices = _by_words(slices) if _is_bits(z) else slices
        chosen(function, self.is_compiled)(*slices, z, *scalars(*numbers))


@dataclass(frozen=True)
class Term:
    """rho z on a part of a tensor, for a memory to take up.

    Args:
        segment: z, dense.
        rho: projected gradient.
    """

    segment: Segment
    rho: float

    def remember(self, memory: Tensor, beta: float) -> None:
        """See `Segment.remember`."""
        self.segment.remember(memory, self.rho, beta)

    def remember_and_descend_sign(
        self, memory: Tensor, beta: float, truth: Tensor, live: Tensor | None, words: Tensor | None, lr: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        """`remember`, then `fused.descend_sign` along the memory, in one pass."""
        slices = (memory, truth, live, words)
        self.segment.run(remember_and_descend_sign, slices, self.rho, beta, 1 - beta, lr, weight_decay)


@dataclass(frozen=True)
class SignTerms:
    """The mean of rho_k z_k over the directions that visit a coordinate, for a memory to take up in one pass.

    Args:
        z: signs as bits, of all directions: int32 [q, 2, n / 32], see `fused.py`.
        rhos: projected gradients.
    """

    z: Tensor
    rhos: Sequence[float]

    @classmethod
    def of(cls, segments: Sequence[Segment | None], rhos: Sequence[float], size: int, device: torch.device) -> Self:
        """Of signs as bits on `size` elements; None = a direction is zero there. Each gets a mask: it is one graph."""
        z = torch.zeros(len(segments), 2, size // philox.BITS, dtype=torch.int32, device=device)
        for own, segment in zip(z, segments, strict=True):
            if segment is not None:
                bits = cast(Tensor, segment.source)
                own[0] = bits[0]
                own[1] = bits[1] if len(bits) == 2 else -1
        return cls(z, rhos)

    def remember(self, memory: Tensor, beta: float) -> None:
        """`fused.remember_mean` of the terms."""
        self._run(remember_signs, (memory,), beta, 1 - beta)

    def remember_and_descend_sign(
        self, memory: Tensor, beta: float, truth: Tensor, live: Tensor | None, words: Tensor | None, lr: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        """`remember`, then `fused.descend_sign` along the memory."""
        slices = (memory, truth, live, words)
        self._run(remember_signs_and_descend_sign, slices, beta, 1 - beta, lr, weight_decay)

    def _run(self, function: Callable[..., None], slices: Sequence[Tensor | None], *numbers: float) -> None:
        chosen(function, True)(*_by_words(slices), self.z, *scalars(*numbers), *scalars(*self.rhos))


def _by_words(slices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Slices [n] as [n / 32, 32]; one that is given twice stays one."""
    views = {id(part): None if part is None else part.view(-1, philox.BITS) for part in slices}
    return [views[id(part)] for part in slices]


class Write(NamedTuple):
    """The arguments of `Segment.write`, but for the radius."""

    segment: Segment
    live: Tensor
    truth: Tensor
    start: int


def write_all(writes: Sequence[Write], radius: float) -> None:
    """`Segment.write` of segments of one direction; those that kernels make in one launch."""
    streams, slices = list[Stream](), list[tuple[Tensor, Tensor]]()
    for segment, live, truth, start in writes:
        if isinstance(segment.source, Stream):
            where = segment.place(start)
            streams.append(segment.source)
            slices.append((live[where], truth[where]))
        else:
            segment.write(live, truth, start, radius)
    perturb_all(streams, slices, radius)


def values(segments: Sequence[Segment]) -> list[Tensor]:
    """z of each in float32; the streams are of one direction, and drawn in one pass."""
    streams = [segment.source for segment in segments if isinstance(segment.source, Stream)]
    made = iter(drawn(streams))
    return [next(made) if isinstance(segment.source, Stream) else _floats(segment.source) for segment in segments]


def _is_bits(z: Tensor) -> bool:
    return z.dtype == torch.int32


def _floats(z: Tensor) -> Tensor:
    return philox.signs(*z).view(-1) if _is_bits(z) else z
