"""`SpectralOptimizer`: which tensors an orthogonalising rule takes, and its options."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, get_args

from zoscale.mesh import Mesh
from zoscale.optim.base import ZeroOrderOptimizer
from zoscale.optim.checks import check_choice
from zoscale.optim.newton_schulz import Iteration, Scale
from zoscale.optim.sharded import Shared, is_vector
from zoscale.shards import ShardedParam, TensorSpec

_EMBEDDING_OR_HEAD = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|head|score)(\.|$)")


class Spectral(Shared, total=False):
    """The options of every orthogonalising rule, as `Shared`."""

    scale: Scale
    iteration: Iteration
    power_rank: int
    sign_lr_scale: float


class SpectralOptimizer(ZeroOrderOptimizer):
    """Hidden matrices go by the rule `muon`; other tensors, embeddings and the head by `sign`, at another lr.

    Vectors, IA3's scales among them, go by `vector`: the same without weight decay. LoRA's matrices of rank 1 are
    matrices as those of any rank are: their update is the row or column over its norm, times about 1 (Newton-Schulz
    leaves it in [0.68, 1.13]), so that each moves by lr as a whole, not in every element.

    Args:
        lr: learning rate >= 0 of the matrices.
        scale: factor by shape: `none` (paper), `spectral` sqrt(max(1, m/n)), `rms` 0.2 sqrt(max(m, n)).
        iteration: how to orthogonalise: Newton-Schulz with the `quintic` polynomial (5 iterations) or the paper's
            `cubic` (10); or `power`, the dominant singular directions only (arXiv 2605.09034).
        power_rank: singular directions that `power` keeps.
        sign_lr_scale: lr factor of the tensors under the sign rule.
    """

    is_elementwise = False

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None,
        options: Mapping[str, Any],
        *,
        scale: Scale = "none",
        iteration: Iteration = "quintic",
        power_rank: int = 16,
        sign_lr_scale: float = 0.1,
        **shared: Unpack[Shared],
    ) -> None:
        self._sign_lr_scale = sign_lr_scale  # before the tensors are put into groups
        spectral = {"scale": scale, "iteration": iteration, "power_rank": power_rank}
        super().__init__(shards, mesh, {**options, **spectral}, **shared)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        check_choice("scale", options["scale"], get_args(Scale))
        check_choice("iteration", options["iteration"], get_args(Iteration))
        if not isinstance(options["power_rank"], int) or options["power_rank"] < 1:
            raise ValueError(f"expected a whole power_rank >= 1, got {options['power_rank']}")

    def rule(self, spec: TensorSpec) -> str:
        if is_vector(spec):
            return "vector"
        return "sign" if len(spec.shape) != 2 or _EMBEDDING_OR_HEAD.search(spec.name) else "muon"

    def rule_options(self, rule: str) -> dict[str, Any]:
        return super().rule_options(rule) | ({} if rule == "muon" else {"lr_scale": self._sign_lr_scale})
