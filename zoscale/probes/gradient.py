"""The direction of a first-order method: the gradient's own, which backpropagation finds."""

from collections.abc import Sequence

from zoscale.noise.generator import Noise
from zoscale.noise.segments import Segment
from zoscale.probes.base import Direction, Piece, Probe
from zoscale.shards import TensorSpec


class GradientDirection(Direction):
    """z = g / |g|, held by DeepSpeed alone."""

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        raise ValueError("expected a direction that is drawn, got the gradient's: train with fo_sgd or fo_adamw")


class Gradient(Probe):
    """z = g / |g|: nothing is drawn. For the optimizers fo_sgd and fo_adamw."""

    def draw(self, noise: Noise, specs: Sequence[TensorSpec], step: int, k: int) -> GradientDirection:
        return GradientDirection()
