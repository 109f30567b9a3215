"""Objectives: from the log-probabilities of the answer tokens to the loss of a micro-batch."""

from typing import Protocol

import torch
from torch import Tensor

from zoscale.batch import MicroBatch


class Objective(Protocol):
    """Loss sum and count of a micro-batch, so that micro-batches reduce to one mean."""

    def __call__(self, logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """
        Args:
            logprobs: float32 [A], log-probability of each answer token.
            batch: what the answers belong to.

        Returns:
            float64 scalars: the sum of the losses and the number of things summed.
        """


def option_scores(logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """Mean log-probability of each option's tokens: float64 [S]."""
    zeros = torch.zeros(batch.option_example.numel(), dtype=torch.float64, device=logprobs.device)
    sums = zeros.scatter_add(0, batch.answer_option, logprobs.double())
    return sums / zeros.scatter_add(0, batch.answer_option, torch.ones_like(logprobs, dtype=torch.float64))


def predictions(logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """The best option of each example, as its number within the example: int64 [num_examples]; ties go to the first."""
    scores = option_scores(logprobs, batch)
    best = []
    for example in range(batch.num_examples):
        best.append(scores[batch.option_example == example].argmax())
    return torch.stack(best)


def classification(logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the options' scores, per example."""
    scores = option_scores(logprobs, batch)
    highest = torch.full((batch.num_examples,), -torch.inf, dtype=torch.float64, device=scores.device)
    highest = highest.scatter_reduce(0, batch.option_example, scores, "amax")
    shifted = (scores - highest[batch.option_example]).exp()
    totals = torch.zeros_like(highest).scatter_add(0, batch.option_example, shifted)
    loss = totals.log().sum() + highest.sum() - scores[batch.option_is_gold].sum()
    return loss, torch.tensor(float(batch.num_examples), dtype=torch.float64, device=scores.device)


def language_modeling(logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the right option's tokens, per token."""
    chosen = batch.option_is_gold[batch.answer_option]
    return -torch.where(chosen, logprobs.double(), 0.0).sum(), chosen.sum().double()


OBJECTIVES: dict[str, Objective] = {"classification": classification, "lm": language_modeling}
