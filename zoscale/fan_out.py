"""`FanOutForward`: the losses of all candidates in one pass; each layer is gathered and read once."""

from collections.abc import Iterator, Sequence

import torch

from zoscale.batch import MicroBatch
from zoscale.estimators import Candidate
from zoscale.fan import Fan, Rows
from zoscale.forward import Losses, local_batches, reduce_losses
from zoscale.mesh import Mesh
from zoscale.models import AnswerModel, tokens_per_pass
from zoscale.objectives import Objective
from zoscale.shared_rows import SharedRows


class FanOutForward:
    """All candidates in one forward of the sharded model per micro-batch; equal to `SequentialForward` to rounding.

    Args:
        model: answers for micro-batches.
        mesh: the ranks that share the micro-batches.
        fan: gives each candidate its weights.
        max_rows: rows of one pass; more are cut by candidates. None = as `tokens_per_pass` says.
    """

    def __init__(self, model: AnswerModel, mesh: Mesh, fan: Fan, *, max_rows: int | None = None) -> None:
        self.model = model
        self.mesh = mesh
        self.fan = fan
        self.max_rows = max_rows
        self.max_tokens = tokens_per_pass(model.model)
        self.shared = SharedRows(model.model)

    @torch.no_grad()
    def losses(self, batches: Sequence[MicroBatch], candidates: Sequence[Candidate], objective: Objective) -> Losses:
        """See `Forward`."""
        own, local = local_batches(self.mesh, batches)
        passing = self.fan.prepare(candidates)
        table = torch.zeros(len(candidates) + 1, len(local), dtype=torch.float64, device=self.mesh.device)
        for turn, batch in enumerate(local):
            for which in self._chunks(len(candidates), batch):
                shared = self.shared.blocks(candidates[which])
                rows = _rows(batch, which.stop - which.start, shared)
                with self.shared.once(shared, rows), passing(which, rows):
                    answers = self.model.answer_logprobs(batch.repeat(rows.copies)).chunk(rows.copies)
                for number, logprobs in enumerate(answers, start=which.start):
                    table[number, turn], table[-1, turn] = objective(logprobs, batch)
        return reduce_losses(self.mesh.gather_items(table, len(batches)).tolist(), local[:own])

    def _chunks(self, num_candidates: int, batch: MicroBatch) -> Iterator[slice]:
        rows, tokens = batch.input_ids.shape
        limit = self.max_tokens // tokens if self.max_rows is None else self.max_rows
        size = max(1, limit // rows)
        for first in range(0, num_candidates, size):
            yield slice(first, min(first + size, num_candidates))


def _rows(batch: MicroBatch, copies: int, shared: Sequence[torch.nn.Module]) -> Rows:
    inside = frozenset(module for block in shared for module in block.modules())
    return Rows(copies, len(batch.input_ids), len(batch.position_row), inside)
