"""`ElementwiseOptimizer`: rules whose update of a coordinate depends on that coordinate alone."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from zoscale.estimators import GradientEstimate
from zoscale.optim.base import ZeroOrderOptimizer, moved
from zoscale.probes import Piece, pieces
from zoscale.shards import ShardedParam


class ElementwiseOptimizer(ZeroOrderOptimizer):
    """x <- x - lr (u + weight_decay x), u from `direction`."""

    rests_at_zero: ClassVar[bool] = False
    """Whether u is 0 where g is: what a step's directions do not touch need not be written then."""

    @abstractmethod
    def direction(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """u on one piece, float32, from g = (1/q) sum_k rho_k z_k there; state is advanced."""

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        for batch in pieces(moved(shards, estimate, group) if self.rests_at_zero else shards):
            for piece, gradient in zip(batch, estimate.mean(batch), strict=True):
                self.descend(piece, self.direction(piece, gradient, group), group)


class GradientDescent(ElementwiseOptimizer):
    """x <- x - lr (g + weight_decay x); where a kernel makes g itself, it is never in memory."""

    rests_at_zero = True

    def direction(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        return gradient

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        for batch in pieces(moved(shards, estimate, group), stream=estimate.stream):
            sums, rest = estimate.sums(batch)
            for together, gradient in sums:
                self.descend_along(together, gradient, group)
            for piece, drawn in zip(rest, estimate.drawn_mean(rest), strict=True):
                self.descend(piece, drawn, group)
