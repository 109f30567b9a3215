"""`BackwardForward`: the loss of a batch and its gradient, by a forward and a backward pass under ZeRO-3."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoscale.data.batch import MicroBatch
from zoscale.estimators import Candidate
from zoscale.forward.division import Division
from zoscale.forward.sequential import Losses, reduce_losses
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.objectives import Objective
from zoscale.partitions import local_gradient
from zoscale.shards import ShardedParam


class BackwardForward:
    """The loss and the norm of its gradient; the gradient of the mean over the whole batch stays with DeepSpeed.

    The mean is over the same micro-batches whoever computes them, so it depends on the number of ranks in rounding
    only.

    Args:
        answers: answers for micro-batches, through a DeepSpeed engine with an optimizer.
        shards: this rank's slices of the trainable tensors.
        mesh: the ranks that share the micro-batches.
    """

    def __init__(self, answers: AnswerModel, shards: Sequence[ShardedParam], mesh: Mesh) -> None:
        self.answers = answers
        self.shards = shards
        self.mesh = mesh

    @property
    def _engine(self) -> Any:
        return self.answers.module

    def losses(self, batches: Sequence[MicroBatch], candidates: Sequence[Candidate], objective: Objective) -> Losses:
        """See `Forward`; the candidates are those of `Backpropagation`."""
        division = Division(self.mesh, len(batches), 1, 1, together=False)
        items = division.items()
        table = division.new_table(items)
        share = self.mesh.world_size / _count(batches, objective)  # DeepSpeed takes the mean over the ranks
        self._engine.optimizer.zero_grad()  # what a step that was skipped has left
        for turn, item in enumerate(items):
            batch = batches[item.batch].to(self.mesh.device)
            with torch.enable_grad():
                loss, count = objective(self.answers.answer_logprobs(batch), batch)
            table[0, turn], table[-1, turn] = loss.detach(), count
            self.backward(loss * (share if item.is_own else 0.0), is_last=turn == len(items) - 1)
        found = reduce_losses(division.gather(table), items, batches)
        return replace(found, values=(*found.values, self._norm()))

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add to the gradient; the last time before the step, DeepSpeed is told so."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss)

    def _norm(self) -> float:
        """Of the whole gradient, not clipped."""
        squares = [local_gradient(shard).double().square().sum() for shard in self.shards]
        parts = self.mesh.gather_items(torch.stack(squares).sum().view(1, 1), self.mesh.world_size)
        return math.sqrt(float(parts.sum()))


def _count(batches: Sequence[MicroBatch], objective: Objective) -> float:
    """Number of things that the loss of the whole batch is the mean of; it depends on no answer."""
    answers = (torch.zeros(batch.answer_token.shape, device=batch.answer_token.device) for batch in batches)
    return sum(float(objective(own, batch)[1]) for own, batch in zip(answers, batches, strict=True))
