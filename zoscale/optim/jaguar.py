"""JAGUAR SignSGD and JAGUAR Muon (arXiv 2506.04430): descent along a memory of partial derivatives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from zoscale.estimators import GradientEstimate
from zoscale.mesh import Mesh
from zoscale.noise.fused import chosen, remember_mean, scalars
from zoscale.noise.segments import SignTerms, Term
from zoscale.optim.base import ZeroOrderOptimizer
from zoscale.optim.checks import check_beta, check_choice
from zoscale.optim.newton_schulz import orthogonalize, update_scale
from zoscale.optim.owners import on_owners
from zoscale.optim.sharded import Company, Shared
from zoscale.optim.spectral import Spectral, SpectralOptimizer
from zoscale.probes import Piece, pieces
from zoscale.shards import ShardedParam

Memory = Callable[[ShardedParam], Tensor]
"""A slice's own: float32 of its length."""
Precision = Literal["auto", "float32", "bfloat16"]


class JaguarSignSGD(ZeroOrderOptimizer):
    """m_S <- beta m_S + (1 - beta) rho z_S on the visited coordinates S; x <- x - lr (sign(m) + weight_decay x).

    Every coordinate moves by the sign of its memory; sign(0) = 0, so a coordinate never visited stays (arXiv
    2506.04430, Algorithm 1). beta = 0 is the overwrite of the original JAGUAR (arXiv 2409.10442). With q > 1
    directions a visited coordinate takes the mean over the directions that visited it.

    Args:
        lr: learning rate >= 0: the step of every coordinate.
        beta: weight of the old memory, in [0, 1).
    """

    goes_with = Company("block", "two_point")

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None = None,
        *,
        lr: float = 1e-4,
        beta: float = 0.9,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr, "beta": beta}, **shared)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        check_beta(options["beta"])

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        beta = group["beta"]
        for batch in pieces(shards, stream=estimate.stream, is_bits=self.is_packed):
            sums, rest = estimate.sums(batch)
            for together, gradient in sums:
                memories = _memories(self.buffer, together)
                self.remember_and_descend_sign_along(together, memories, gradient, beta, group)
            for piece, memory, pending in _visit(self.buffer, rest, estimate, beta):
                if pending is None:
                    self.descend_sign(piece, memory, group)
                else:
                    self.remember_and_descend_sign(piece, memory, pending, beta, group)


class JaguarMuon(SpectralOptimizer):
    """JAGUAR's memory, orthogonalised: X <- X - lr (scale O(m) + weight_decay X) (arXiv 2506.04430, Algorithm 2).

    Matrices are updated along the Newton-Schulz orthogonalisation of their whole memory, which one rank of the shard
    group computes for all. Vectors, tensors of another number of dimensions, embeddings and the head never go through
    Newton-Schulz: they take the sign rule.

    Args:
        beta: weight of the old memory, in [0, 1).
        precision: of the orthogonalisation: `float32` (runs on another number of ranks agree to 1e-5), `bfloat16`
            (faster on a GPU; they agree to its rounding), or `auto`: bfloat16 on a GPU, float32 on a CPU.
    """

    goes_with = Company("block", "two_point")

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None = None,
        *,
        lr: float = 1e-2,
        beta: float = 0.9,
        precision: Precision = "auto",
        **spectral: Unpack[Spectral],
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr, "beta": beta, "precision": precision}, **spectral)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        check_beta(options["beta"])
        check_choice("precision", options["precision"], get_args(Precision))

    def remember(
        self, shards: Sequence[ShardedParam], estimate: GradientEstimate, beta: float
    ) -> Iterator[tuple[Piece, Tensor]]:
        """Bring the memory up to date; yields each piece with it."""
        for batch in pieces(shards, is_bits=self.is_packed):
            sums, rest = estimate.sums(batch)
            for together, gradient in sums:
                memories = _memories(self.buffer, together)
                gradient.remember(memories, beta)
                yield from zip(together, memories, strict=True)
            for piece, memory, pending in _visit(self.buffer, rest, estimate, beta):
                if pending is not None:
                    pending.remember(memory, beta)
                yield piece, memory

    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        for piece, memory in self.remember(shards, estimate, group["beta"]):
            if group["rule"] != "muon":
                self.descend_sign(piece, memory, group)
        if group["rule"] == "muon":
            function = partial(orthogonalize, iteration=group["iteration"], power_rank=group["power_rank"])
            dtype = self._dtype(group["precision"])
            for bucket in on_owners(function, shards, self.buffer, self.mesh, dtype=dtype):
                updates = [direction for _, direction in bucket]
                scales = [update_scale(shard.spec.rows, shard.spec.columns, group["scale"]) for shard, _ in bucket]
                torch._foreach_mul_(updates, scales)
                self.descend_all([Piece(shard, 0, len(shard)) for shard, _ in bucket], updates, group)

    def _dtype(self, precision: Precision) -> torch.dtype:
        if precision == "auto":
            return torch.bfloat16 if self.mesh.device.type == "cuda" else torch.float32
        return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _memories(memory: Memory, batch: Sequence[Piece]) -> list[Tensor]:
    return [memory(piece.shard)[piece.start : piece.stop] for piece in batch]


def _visit(
    memory: Memory, batch: Sequence[Piece], estimate: GradientEstimate, beta: float
) -> Iterator[tuple[Piece, Tensor, Term | SignTerms | None]]:
    """m_S <- beta m_S + (1 - beta) g_S on the visited coordinates, where g must be drawn.

    Yields:
        Each piece with its memory, and what the memory is still to take up; None = it is up to date.
    """
    if batch:
        memories = _memories(memory, batch)
        mix = _mix_one if len(estimate.directions) == 1 else _mix_mean
        yield from zip(batch, memories, mix(memories, batch, estimate, beta), strict=True)


def _mix_one(
    memories: Sequence[Tensor], batch: Sequence[Piece], estimate: GradientEstimate, beta: float
) -> Iterator[Term | None]:
    """Of one direction: only what it visits is read and written; where that is all, by whoever reads the memory."""
    (direction,), (rho,) = estimate.directions, estimate.projected_grads
    for memory, segment in zip(memories, direction.segments(batch), strict=True):
        if segment is None:
            yield None
        elif segment.index is None:
            yield Term(segment, rho)
        else:
            segment.remember(memory, rho, beta)
            yield None


def _mix_mean(
    memories: Sequence[Tensor], batch: Sequence[Piece], estimate: GradientEstimate, beta: float
) -> Iterator[SignTerms | None]:
    """Of several: a coordinate takes the mean over the directions that visit it."""
    signs = estimate.signs(batch)
    rest = [piece for piece, found in zip(batch, signs, strict=True) if found is None]
    totals = iter(estimate.totals(rest) if rest else ())
    run = chosen(remember_mean, estimate.is_compiled)
    for memory, found in zip(memories, signs, strict=True):
        if found is None:
            run(memory, *next(totals), *scalars(beta, 1 - beta))
        yield found
