"""Dense probes: independent values on every trainable element."""

from collections.abc import Sequence

from zoscale.noise.generator import Noise, stays_bits
from zoscale.noise.kernels import stream_of
from zoscale.noise.segments import Segment
from zoscale.noise.streams import Distribution, Stream
from zoscale.probes.base import Direction, DrawnDirection, Piece, Probe
from zoscale.shards import TensorSpec


class _Dense(DrawnDirection):
    def __init__(self, noise: Noise, step: int, k: int, distribution: Distribution) -> None:
        super().__init__(noise, step, k)
        self.distribution = distribution

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        streams = [stream for piece in group if (stream := self.stream(piece)) is not None]
        if len(streams) == len(group):
            return [Segment(stream, is_compiled=True) for stream in streams]
        signs = self.noise.sign_bits if self.is_compiled else self.noise.rademacher
        draw = self.noise.normal if self.distribution == "normal" else signs
        values = draw(self.key, [piece.range for piece in group], group[0].shard.truth.device)
        return [Segment(value, is_compiled=self.is_compiled) for value in values]

    def is_bits(self, piece: Piece) -> bool:
        return self.is_compiled and self.distribution == "rademacher" and stays_bits(piece.range)

    def stream(self, piece: Piece) -> Stream | None:
        return stream_of(self.noise, self.key, piece.range, self.distribution, piece.shard.truth.device)


class Gaussian(Probe):
    """z ~ N(0, I) on every trainable element (MeZO, arXiv 2305.17333)."""

    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> Direction:
        return _Dense(noise, step, k, "normal")


class Rademacher(Probe):
    """z = +1 or -1 on every trainable element."""

    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> Direction:
        return _Dense(noise, step, k, "rademacher")
