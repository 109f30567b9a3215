"""ZO-Muon: orthogonalised descent on dense estimates, in the whole space or in a random subspace."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from zoscale.estimators import GradientEstimate
from zoscale.mesh import Mesh
from zoscale.optim.base import moved
from zoscale.optim.jaguar import JaguarMuon, Precision
from zoscale.optim.newton_schulz import orthogonalize, update_scale
from zoscale.optim.sharded import Company
from zoscale.optim.spectral import Spectral, SpectralOptimizer
from zoscale.probes import LayersDirection, Piece, SubspaceDirection, pieces, product_slice
from zoscale.shards import ShardedParam


class ZOMuon(JaguarMuon):
    """m <- beta m + (1 - beta) g; X <- X - lr (scale O(m) + weight_decay X) (arXiv 2506.04430, Algorithm 3).

    JAGUAR Muon whose memory fades everywhere, not on visited coordinates only; without memory (beta = 0) by default,
    where of a single direction only sign(rho) O(z) is left. (The memory's place is then where g is put together.)
    """

    goes_with = Company("gaussian", "two_point")

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None = None,
        *,
        lr: float = 1e-2,
        beta: float = 0.0,
        precision: Precision = "auto",
        **spectral: Unpack[Spectral],
    ) -> None:
        super().__init__(shards, mesh, lr=lr, beta=beta, precision=precision, **spectral)

    def remember(
        self, shards: Sequence[ShardedParam], estimate: GradientEstimate, beta: float
    ) -> Iterator[tuple[Piece, Tensor]]:
        for batch in pieces(shards):
            for piece, gradient in zip(batch, estimate.mean(batch), strict=True):
                memory = self.buffer(piece.shard)[piece.start : piece.stop]
                yield piece, memory.copy_(memory * beta + gradient * (1 - beta))


class ZOMuonSubspace(SpectralOptimizer):
    """X <- X - lr (scale P O((1/q) sum_k rho_k Psi_k) + weight_decay X), z_k = P Psi_k (ZO-Muon, arXiv 2602.17155).

    The estimate is orthogonalised in the subspace [r, n] and lifted back. Every rank draws P and Psi for itself, so the
    matrices cross no network, and there is no state. Tensors that Muon leaves out take the sign rule. Four directions
    per step, unless `num_directions` says otherwise: of a single one only sign(rho) would be left.
    """

    goes_with = Company("subspace", "one_sided", {"estimator": {"num_directions": 4}})
    needs = frozenset({"probe"})

    def __init__(
        self, shards: Sequence[ShardedParam], mesh: Mesh | None = None, *, lr: float = 1e-2, **own: Unpack[Spectral]
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr}, **own)

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        shards = moved(shards, estimate, group)
        for shard in shards if group["rule"] == "muon" else ():
            if len(shard):
                basis, direction = self._orthogonalized(shard, estimate, group)
                for (piece,) in pieces([shard]):
                    lifted = product_slice(basis, direction, piece.range.start, piece.range.stop)
                    self.descend(piece, lifted, group)
        for batch in pieces(shards if group["rule"] != "muon" else ()):
            for piece, gradient in zip(batch, estimate.mean(batch), strict=True):
                self.descend(piece, gradient.sign(), group)

    def _orthogonalized(
        self, shard: ShardedParam, estimate: GradientEstimate, group: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """P [m, r] and scale O(...) [r, n] of a whole matrix, the same bits on every rank."""
        spec, device = shard.spec, shard.truth.device
        total = torch.zeros((), device=device)
        for direction, rho in zip(estimate.directions, estimate.projected_grads, strict=True):
            z = direction.inner if isinstance(direction, LayersDirection) else direction
            assert isinstance(z, SubspaceDirection), "the probe is checked before the run"
            ((basis, psi),) = z.draw_factors([spec], device)
            total = total + (psi * rho if direction.touches(spec) else torch.zeros_like(psi))
        found = orthogonalize(
            total / len(estimate.directions), iteration=group["iteration"], power_rank=group["power_rank"]
        )
        return basis, found * update_scale(spec.rows, spec.columns, group["scale"])
