"""Sign rules: ZO-SignSGD, the sign of the projected gradient, and ZO-Muon with an orthogonal direction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from torch import Tensor

from zoscale.estimators import GradientEstimate
from zoscale.mesh import Mesh
from zoscale.optim.elementwise import ElementwiseOptimizer, GradientDescent
from zoscale.optim.sharded import Company, Shared
from zoscale.probes import Piece
from zoscale.shards import ShardedParam


class ZOSignSGD(ElementwiseOptimizer):
    """x <- x - lr (sign(g) + weight_decay x), element by element; sign(0) = 0 (ZO-signSGD, Liu et al., ICLR 2019).

    Args:
        lr: learning rate >= 0: the step of every coordinate.
    """

    rests_at_zero = True

    def __init__(
        self, shards: Sequence[ShardedParam], mesh: Mesh | None = None, *, lr: float = 1e-5, **shared: Unpack[Shared]
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr}, **shared)

    def direction(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        return gradient.sign()


class ZOSignRho(GradientDescent):
    """x <- x - lr ((1/q) sum_k sign(rho_k) z_k + weight_decay x): the sign of ZO-Bench's code (arXiv 2402.11592)."""

    def __init__(
        self, shards: Sequence[ShardedParam], mesh: Mesh | None = None, *, lr: float = 1e-5, **shared: Unpack[Shared]
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr}, **shared)

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        signs = tuple(math.copysign(1.0, rho) if rho else 0.0 for rho in estimate.projected_grads)
        super().update(shards, replace(estimate, projected_grads=signs), group)


class ZOMuonOrthogonal(ZOSignRho):
    """x <- x - lr (sign(rho) U V^T + weight_decay x), z = U V^T orthonormal (arXiv 2506.04430, Algorithm 4).

    The estimate along an orthogonal direction is orthogonal already; with q directions their mean is taken.
    Entries of z are about 1 / sqrt(max(m, n)), and tau is larger accordingly: else 16 bits lose them.
    """

    goes_with = Company("orthogonal", "two_point", {"estimator": {"tau": 0.1}})
    needs = frozenset({"probe"})

    def __init__(
        self, shards: Sequence[ShardedParam], mesh: Mesh | None = None, *, lr: float = 1e-2, **shared: Unpack[Shared]
    ) -> None:
        super().__init__(shards, mesh, lr=lr, **shared)
