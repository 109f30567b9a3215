"""Metrics of a model on examples, shared out to the ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zoscale.batch import MicroBatch
from zoscale.mesh import Mesh
from zoscale.models import AnswerModel
from zoscale.objectives import classification, language_modeling, predictions


@dataclass(frozen=True)
class Evaluation:
    """Metrics over a split; the same on every rank.

    Args:
        count: examples scored: all of them.
        accuracy: share of examples whose right option scores highest.
        loss: cross-entropy over the options, per example.
        lm_loss: cross-entropy of the right option's tokens, per token.
    """

    count: int
    accuracy: float
    loss: float
    lm_loss: float

    @property
    def is_finite(self) -> bool:
        """Whether the losses are numbers; the accuracy always is one, of whatever weights."""
        return math.isfinite(self.loss) and math.isfinite(self.lm_loss)


@torch.no_grad()
def evaluate(model: AnswerModel, batches: Sequence[MicroBatch], mesh: Mesh) -> Evaluation:
    """Score every example once. A collective: all ranks call it with the same batches.

    Raises:
        ValueError: without examples.
    """
    if not batches:
        raise ValueError("expected at least one micro-batch to evaluate, got none")
    mine, turns = mesh.share(len(batches))
    mine += [mesh.rank % len(batches)] * (turns - len(mine))
    table = torch.zeros(5, turns, dtype=torch.float64, device=mesh.device)
    for turn, item in enumerate(mine):
        batch = batches[item].to(mesh.device)
        logprobs = model.answer_logprobs(batch)
        table[0, turn] = (predictions(logprobs, batch) == _gold(batch)).sum()
        table[1, turn], table[2, turn] = classification(logprobs, batch)
        table[3, turn], table[4, turn] = language_modeling(logprobs, batch)
    correct, loss, count, lm_loss, tokens = (sum(row) for row in mesh.gather_items(table, len(batches)).tolist())
    return Evaluation(int(count), correct / count, loss / count, lm_loss / tokens)


def _gold(batch: MicroBatch) -> torch.Tensor:
    """The number of the right option within its example: int64 [num_examples]."""
    places = batch.option_is_gold.nonzero(as_tuple=True)[0]
    first = torch.searchsorted(batch.option_example, torch.arange(batch.num_examples, device=places.device))
    return places - first
