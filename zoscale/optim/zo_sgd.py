"""Descent on the estimate itself: ZO-SGD, with momentum, and FZOO."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from torch import Tensor

from zoscale.mesh import Mesh
from zoscale.optim.checks import check_beta
from zoscale.optim.elementwise import ElementwiseOptimizer, GradientDescent
from zoscale.optim.sharded import Company, Shared
from zoscale.probes import Piece
from zoscale.shards import ShardedParam


class ZOSGD(GradientDescent):
    """x <- x - lr (g + weight_decay x), g = (1/q) sum_k rho_k z_k (MeZO, arXiv 2305.17333, Algorithm 1).

    Without state.
    """

    def __init__(
        self, shards: Sequence[ShardedParam], mesh: Mesh | None = None, *, lr: float = 1e-6, **shared: Unpack[Shared]
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr}, **shared)


class FZOO(ZOSGD):
    """x <- x - lr (g / sigma + weight_decay x): ZO-SGD normalised by the losses' spread (FZOO, arXiv 2506.09034).

    The division by sigma, the standard deviation of the losses, is in the projected gradients of the estimator `fzoo`.
    """

    goes_with = Company("rademacher", "fzoo")
    needs = frozenset({"estimator"})


class ZOSGDMomentum(ElementwiseOptimizer):
    """v <- momentum v + g; x <- x - lr (v + weight_decay x) (Acc-ZOM in ZO-Bench, arXiv 2402.11592).

    Args:
        momentum: weight of the old v, in [0, 1).
    """

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None = None,
        *,
        lr: float = 1e-6,
        momentum: float = 0.9,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr, "momentum": momentum}, **shared)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        check_beta(options["momentum"], "momentum")

    def direction(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        velocity = self.buffer(piece.shard)[piece.start : piece.stop]
        return velocity.copy_(velocity * group["momentum"] + gradient)
