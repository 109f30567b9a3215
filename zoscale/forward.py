"""Losses of K candidate points on one batch, forward only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch

from zoscale.batch import MicroBatch
from zoscale.estimators import Candidate
from zoscale.mesh import Mesh
from zoscale.models import AnswerModel
from zoscale.objectives import Objective
from zoscale.probes import pieces
from zoscale.shards import ShardedParam


@dataclass(frozen=True)
class Losses:
    """The same on every rank.

    Args:
        values: the mean loss of each candidate over the whole batch (float64).
        count: number of things averaged (examples or tokens).
        local_tokens: real tokens that this rank ran, over all candidates, without repeated work.
        local_samples: examples that this rank ran, likewise.
    """

    values: tuple[float, ...]
    count: float
    local_tokens: int
    local_samples: int

    def followed_by(self, other: Self) -> Self:
        """These losses and then others on the same batch."""
        return replace(
            self,
            values=self.values + other.values,
            local_tokens=self.local_tokens + other.local_tokens,
            local_samples=self.local_samples + other.local_samples,
        )


class Forward(Protocol):
    """Evaluates candidates; the weights are bit-identical before and after, also when it raises."""

    def losses(self, batches: Sequence[MicroBatch], candidates: Sequence[Candidate], objective: Objective) -> Losses:
        """The loss of every candidate on the same micro-batches (the whole batch, the same list on every rank)."""


class SequentialForward:
    """One forward of the sharded model per candidate and micro-batch: the oracle of faster ones.

    Args:
        model: answers for micro-batches.
        shards: this rank's slices of the trainable tensors.
        mesh: the ranks that share the micro-batches.
        answer: what the objective reads of a micro-batch; None = the log-probabilities of its answer tokens.
    """

    def __init__(
        self,
        model: AnswerModel,
        shards: Sequence[ShardedParam],
        mesh: Mesh,
        *,
        answer: Callable[[MicroBatch], Any] | None = None,
    ) -> None:
        self.model = model
        self.shards = shards
        self.mesh = mesh
        self.answer = answer or model.answer_logprobs

    @torch.no_grad()
    def losses(self, batches: Sequence[MicroBatch], candidates: Sequence[Candidate], objective: Objective) -> Losses:
        """See `Forward`."""
        own, local = local_batches(self.mesh, batches)
        table = torch.zeros(len(candidates) + 1, len(local), dtype=torch.float64, device=self.mesh.device)
        for number, candidate in enumerate(candidates):
            with perturbed(self.shards, candidate):
                for turn, batch in enumerate(local):
                    table[number, turn], table[-1, turn] = objective(self.answer(batch), batch)
        return reduce_losses(self.mesh.gather_items(table, len(batches)).tolist(), local[:own])


def local_batches(mesh: Mesh, batches: Sequence[MicroBatch]) -> tuple[int, list[MicroBatch]]:
    """How many micro-batches are this rank's own, and as many as every rank runs: its own, then repeated ones."""
    mine, turns = mesh.share(len(batches))
    surplus = [mesh.rank % len(batches)] * (turns - len(mine))
    return len(mine), [batches[item].to(mesh.device) for item in mine + surplus]


@contextmanager
def perturbed(shards: Sequence[ShardedParam], candidate: Candidate) -> Iterator[None]:
    """Within, the next forward reads x + radius * z; after, every live slice is what it was, bit for bit."""
    if candidate.direction is None:
        yield
        return
    try:
        for group in pieces(shards):
            for piece, segment in zip(group, candidate.direction.segments(group), strict=True):
                if segment is not None:
                    piece.shard.perturb(piece.start, segment, candidate.radius)
        for shard in shards:
            shard.reach_next_forward()
        yield
    finally:
        for shard in shards:
            shard.restore()


def reduce_losses(table: list[list[float]], own: Sequence[MicroBatch]) -> Losses:
    """Sum in micro-batch order in float64: the same bits at any world size."""
    *sums, counts = table
    count = sum(counts)
    return Losses(
        tuple(sum(row) / count for row in sums),
        count,
        len(sums) * sum(batch.num_tokens for batch in own),
        len(sums) * sum(batch.num_examples for batch in own),
    )
