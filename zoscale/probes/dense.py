"""Dense probes: independent values on every trainable element."""

from collections.abc import Sequence
from typing import Literal

from zoscale.noise import Noise
from zoscale.probes.base import Direction, DrawnDirection, Piece, Probe
from zoscale.shards import Segment, TensorSpec


class _Dense(DrawnDirection):
    def __init__(self, noise: Noise, step: int, k: int, distribution: Literal["normal", "rademacher"]) -> None:
        super().__init__(noise, step, k)
        self._draw = noise.normal if distribution == "normal" else noise.rademacher

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        values = self._draw(self.key, [piece.range for piece in group], group[0].shard.truth.device)
        return [Segment(value, is_compiled=self.is_compiled) for value in values]


class Gaussian(Probe):
    """z ~ N(0, I) on every trainable element (MeZO, arXiv 2305.17333)."""

    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> Direction:
        return _Dense(noise, step, k, "normal")


class Rademacher(Probe):
    """z = +1 or -1 on every trainable element."""

    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> Direction:
        return _Dense(noise, step, k, "rademacher")
