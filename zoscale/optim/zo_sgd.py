"""ZO-SGD: stochastic gradient descent on the estimate (MeZO)."""

from collections.abc import Sequence
from typing import Any

from zoscale.estimators import GradientEstimate
from zoscale.mesh import Mesh
from zoscale.optim.base import ZeroOrderOptimizer
from zoscale.probes import pieces
from zoscale.shards import ShardedParam, TensorSpec


class ZOSGD(ZeroOrderOptimizer):
    """x <- x - lr (g + weight_decay x), g = (1/q) sum_k rho_k z_k (MeZO, arXiv 2305.17333, Algorithm 1).

    Without state. Vectors (biases, LayerNorm) are not decayed.

    Args:
        lr: learning rate >= 0.
        weight_decay: decoupled weight decay >= 0.
        groups: overrides by name, see `ZeroOrderOptimizer`.
    """

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None = None,
        *,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr, "weight_decay": weight_decay}, groups)

    def rule(self, spec: TensorSpec) -> str:
        return "matrix" if spec.is_matrix else "vector"

    def rule_options(self, rule: str) -> dict[str, Any]:
        return {"weight_decay": 0.0} if rule == "vector" else {}

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        for batch in pieces(shards):
            for piece, gradient in zip(batch, estimate.mean(batch), strict=True):
                self.descend(piece, gradient, group)
