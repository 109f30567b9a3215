"""ZO-AdaMM: Adam on the estimate."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from zoscale.estimators import GradientEstimate
from zoscale.mesh import Mesh
from zoscale.optim.checks import check_beta, check_choice
from zoscale.optim.elementwise import ElementwiseOptimizer
from zoscale.optim.sharded import Shared
from zoscale.probes import Piece
from zoscale.shards import ShardedParam

SecondMoment = Literal["last", "max"]


class ZOAdam(ElementwiseOptimizer):
    """Adam with decoupled weight decay on g (ZO-AdaMM, arXiv 1910.06513, as in ZO-Bench, arXiv 2402.11592).

    m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2;
    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps); x <- x - lr (u + weight_decay x).
    Two (`max`: three) fp32 numbers per trainable element, sharded.

    Args:
        beta1: weight of the old mean, in [0, 1).
        beta2: weight of the old mean square, in [0, 1).
        eps: > 0, added to the root.
        second_moment: `last` as Adam, or `max`, the largest v so far, as AMSGrad and the theory of ZO-AdaMM.
    """

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None = None,
        *,
        lr: float = 1e-5,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        second_moment: SecondMoment = "last",
        **shared: Unpack[Shared],
    ) -> None:
        moments = {"beta1": beta1, "beta2": beta2, "eps": eps, "second_moment": second_moment}
        super().__init__(shards, mesh, {"lr": lr, **moments}, **shared)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        check_beta(options["beta1"], "beta1")
        check_beta(options["beta2"], "beta2")
        check_choice("second_moment", options["second_moment"], get_args(SecondMoment))
        if not 0 < options["eps"] < math.inf:
            raise ValueError(f"expected a finite eps > 0, got {options['eps']}")

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        for shard in shards:
            state = self.state[shard.truth]
            state["step"] = state.get("step", 0.0) + 1.0
        super().update(shards, estimate, group)

    def direction(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        shard, where, (beta1, beta2) = piece.shard, slice(piece.start, piece.stop), (group["beta1"], group["beta2"])
        step = self.state[shard.truth]["step"]
        m, v = self.buffer(shard)[where], self.buffer(shard, "second_moment")[where]
        m.copy_(m * beta1 + gradient * (1 - beta1))
        v.copy_(v * beta2 + gradient * gradient * (1 - beta2))
        if group["second_moment"] == "max":
            v = torch.maximum(v, largest := self.buffer(shard, "largest_second_moment")[where], out=largest)
        root = (v / (1 - beta2**step)).sqrt()
        direction: Tensor = m / (1 - beta1**step) / (root + group["eps"])
        return direction
