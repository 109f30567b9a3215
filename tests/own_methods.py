"""Methods of a user's own, named as `own_methods:Class`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from zoscale.estimators import TwoPoint
from zoscale.mesh import Mesh
from zoscale.optim import ElementwiseOptimizer
from zoscale.probes import Gaussian, Piece
from zoscale.shards import ShardedParam
from zoscale.tasks import SST2

NO_CLASS = 1


class Clipped(ElementwiseOptimizer):
    """x <- x - lr clamp(g, -limit, limit).

    Args:
        limit: of each coordinate.
    """

    def __init__(
        self, shards: Sequence[ShardedParam], mesh: Mesh | None = None, *, lr: float = 1e-3, limit: float = 1.0
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr, "limit": limit})

    def direction(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        return gradient.clamp(-group["limit"], group["limit"])


class Draws(Gaussian):
    """Normal directions under another name."""


class Losses(TwoPoint):
    """Two losses per direction under another name."""


class Reviews(SST2):
    """SST-2 under another name."""


class Unmade(ElementwiseOptimizer):
    """Has no `__init__`, which its base wants."""

    def direction(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        return gradient


class Lacking(ElementwiseOptimizer):
    """Has no `direction`."""


class Odd(Gaussian):
    """Has an option that cannot be written in a configuration."""

    def __init__(self, *, name: str = "x") -> None:
        super().__init__()
        self.name = name
