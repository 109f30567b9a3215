"""Losses of K candidate points on one batch, forward only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol, Self

import torch

from zoscale.data.batch import MicroBatch
from zoscale.estimators import Candidate
from zoscale.forward.division import Division, Item
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
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
        num_parts: parts of the candidates that are shared out too, to shard groups: within one, all ranks read the
            same perturbed shards.
        answer: what the objective reads of a micro-batch; None = the log-probabilities of its answer tokens.
    """

    def __init__(
        self,
        model: AnswerModel,
        shards: Sequence[ShardedParam],
        mesh: Mesh,
        *,
        num_parts: int = 1,
        answer: Callable[[MicroBatch], Any] | None = None,
    ) -> None:
        self.model = model
        self.shards = shards
        self.mesh = mesh
        self.num_parts = num_parts
        self.answer = answer

    @torch.no_grad()
    def losses(self, batches: Sequence[MicroBatch], candidates: Sequence[Candidate], objective: Objective) -> Losses:
        """See `Forward`."""
        division = Division(self.mesh, len(batches), len(candidates), self.num_parts, together=True)
        items = division.items()
        answer = self.answer or self.model.answer_logprobs
        local = {item.batch: batches[item.batch].to(self.mesh.device) for item in items}
        table = division.new_table(items)
        for _, run in groupby(enumerate(items), key=lambda turn: turn[1].candidates):
            turns = list(run)
            own = list(candidates[turns[0][1].candidates])
            if self.answer is not None:  # generated, by all ranks at a time: a shorter part repeats its last candidate
                own += own[-1:] * (len(table) - 1 - len(own))
            for row, candidate in enumerate(own):
                with perturbed(self.shards, candidate):
                    for turn, item in turns:
                        batch = local[item.batch]
                        table[row, turn], table[-1, turn] = objective(answer(batch), batch)
        return reduce_losses(division.gather(table), items, batches)


@contextmanager
def perturbed(shards: Sequence[ShardedParam], candidate: Candidate) -> Iterator[None]:
    """Within, the next forward reads x + radius * z; after, every live slice is what it was, bit for bit."""
    if candidate.direction is None:
        yield
        return
    try:
        for group in pieces(shards, stream=candidate.direction.stream):
            for piece, segment in zip(group, candidate.direction.segments(group), strict=True):
                if segment is not None:
                    piece.shard.perturb(piece.start, segment, candidate.radius)
        for shard in shards:
            shard.reach_next_forward()
        yield
    finally:
        for shard in shards:
            shard.restore()


def reduce_losses(table: list[list[float]], items: Sequence[Item], batches: Sequence[MicroBatch]) -> Losses:
    """Sum in micro-batch order in float64: the same bits at any world size.

    Args:
        table: [K + 1][B], from `Division.gather`.
        items: that this rank computed.
        batches: the micro-batches.
    """
    *sums, counts = table
    count = sum(counts)
    own = [(batches[i.batch], i.candidates.stop - i.candidates.start) for i in items if i.is_own]
    return Losses(
        tuple(sum(row) / count for row in sums),
        count,
        sum(times * batch.num_tokens for batch, times in own),
        sum(times * batch.num_examples for batch, times in own),
    )
