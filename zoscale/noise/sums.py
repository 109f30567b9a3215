"""`Sum`: what projected gradients make of several directions, for kernels that make each z in registers."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoscale.noise.fused import on_device
from zoscale.noise.generator import Domain, Key
from zoscale.noise.streams import Stream, counter_word, launch


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
        return counter_word(Key(self.streams[0][0].key.step, domain=Domain.ROUNDING)) if rounded else None

    def _run(self, kernel: str, slices: Sequence[Sequence[Tensor | None]], *rest: Any) -> None:
        first = self.streams[0]
        words = tuple(counter_word(stream.key) for stream in first)
        settings = (len(words), *_tables(words, self.rhos, first[0].device), *rest)
        launch(kernel, self.streams, list(zip(*slices, strict=True)), settings)


@functools.lru_cache(maxsize=8)
def _tables(words: tuple[int, ...], rhos: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Counter words (int32 [q]) and factors (float32 [q]) of a step, in one transfer."""
    factors = torch.tensor(rhos, dtype=torch.float32).view(torch.int32)
    both = on_device(torch.cat([torch.tensor(words, dtype=torch.int32), factors]), device)
    return both[: len(words)], both[len(words) :].view(torch.float32)
