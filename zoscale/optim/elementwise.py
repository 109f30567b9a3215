"""`ElementwiseOptimizer`: rules whose update of a coordinate depends on that coordinate alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from zoscale.estimators import GradientEstimate
from zoscale.optim.base import ZeroOrderOptimizer
from zoscale.probes import Piece, pieces
from zoscale.shards import ShardedParam, TensorSpec


class ElementwiseOptimizer(ZeroOrderOptimizer):
    """x <- x - lr (u + weight_decay x), u from `direction`. Vectors (biases, LayerNorm) are not decayed."""

    def direction(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """u on one piece, float32, from g = (1/q) sum_k rho_k z_k there; state is advanced. Here it is g itself."""
        return gradient

    def rule(self, spec: TensorSpec) -> str:
        return "matrix" if spec.is_matrix else "vector"

    def rule_options(self, rule: str) -> dict[str, Any]:
        return {"weight_decay": 0.0} if rule == "vector" else {}

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        for batch in pieces(shards):
            is_gradient = type(self).direction is ElementwiseOptimizer.direction
            sums = estimate.streams(batch) if is_gradient else None
            if sums is not None:
                for piece, made_there in zip(batch, sums, strict=True):
                    self.descend(piece, made_there, group)
            else:
                for piece, gradient in zip(batch, estimate.mean(batch), strict=True):
                    self.descend(piece, self.direction(piece, gradient, group), group)
