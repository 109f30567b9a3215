"""Objectives: from the model's answers to the loss of a micro-batch, differentiable or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zoscale.data.batch import MicroBatch
from zoscale.metrics import Score


class Objective(Protocol):
    """Loss sum and count of a micro-batch, so that micro-batches reduce to one mean."""

    def __call__(self, answers: Any, batch: MicroBatch, /) -> tuple[Tensor, Tensor]:
        """
        Args:
            answers: float32 [A], log-probability of each answer token; for `GeneratedLoss` the generated texts.
            batch: what the answers belong to.

        Returns:
            float64 scalars: the sum of the losses and the number of things summed.
        """


def option_scores(logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """Mean log-probability of each option's tokens: float64 [S]."""
    num_options = batch.option_example.numel()
    counts = sums_by(torch.ones_like(logprobs, dtype=torch.float64), batch.answer_option, num_options)
    return sums_by(logprobs.double(), batch.answer_option, num_options) / counts


def by_example(values: Tensor, batch: MicroBatch) -> list[list[Any]]:
    """Values of the options, [S], as one list for each example."""
    found: list[list[Any]] = [[] for _ in range(batch.num_examples)]
    for example, value in zip(batch.option_example.tolist(), values.tolist(), strict=True):
        found[example].append(value)
    return found


def sums_by(values: Tensor, index: Tensor, count: int) -> Tensor:
    """The sum of the values of each index: [count], the same bits whenever it is taken.

    Args:
        values: float64 [n].
        index: int64 [n], in [0, count).
        count: of the sums.
    """
    if values.is_cuda:  # where scatter_add adds in the order in which threads come
        return sums_in_order(values, index, count)
    return values.new_zeros(count).scatter_add(0, index, values)


def sums_in_order(values: Tensor, index: Tensor, count: int) -> Tensor:
    """`sums_by`, as the rows of a table [count, n]."""
    own = index == torch.arange(count, device=index.device)[:, None]
    return torch.where(own, values, 0.0).sum(1)


def predictions(logprobs: Tensor, batch: MicroBatch) -> Tensor:
    """The best option of each example, as its number within the example: int64 [num_examples]; ties go to the first."""
    scores = option_scores(logprobs, batch)
    own = batch.option_example == torch.arange(batch.num_examples, device=scores.device)[:, None]
    first = own.to(torch.int64).argmax(1)
    return (torch.where(own, scores, -torch.inf).argmax(1) - first).clamp(min=0)  # below it if none is above -inf


def classification(logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the options' scores, per example."""
    scores = option_scores(logprobs, batch)
    highest = torch.full((batch.num_examples,), -torch.inf, dtype=torch.float64, device=scores.device)
    highest = highest.scatter_reduce(0, batch.option_example, scores, "amax")
    shifted = (scores - highest[batch.option_example]).exp()
    totals = sums_by(shifted, batch.option_example, batch.num_examples)
    loss = totals.log().sum() + highest.sum() - torch.where(batch.option_is_gold, scores, 0.0).sum()
    return loss, scores.new_full((), batch.num_examples)


def language_modeling(logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the right option's tokens, per token."""
    chosen = batch.option_is_gold[batch.answer_option]
    return -torch.where(chosen, logprobs.double(), 0.0).sum(), chosen.sum().double()


def chosen_texts(logprobs: Tensor, batch: MicroBatch) -> list[str]:
    """What the best option of each example stands for.

    Raises:
        ValueError: if the micro-batch does not carry its texts.
    """
    if len(batch.questions) != batch.num_examples:
        raise ValueError("expected a micro-batch with the texts of its examples, got one of tokens: use an Encoder")
    chosen = predictions(logprobs, batch).tolist()
    return [question.labels[option] for question, option in zip(batch.questions, chosen, strict=True)]


def score_sum(score: Score, texts: Sequence[str], batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Sum of the scores of one text per example, and the number of examples: float64 scalars on the batch's device."""
    total = sum(score(text, question.accepted) for text, question in zip(texts, batch.questions, strict=True))
    sums = torch.tensor([total, len(texts)], dtype=torch.float64, device=batch.input_ids.device)
    return sums[0], sums[1]


@dataclass(frozen=True)
class ChosenLoss:
    """1 - score of the option that is chosen, per example. Piecewise constant: it has no gradient.

    Args:
        score: of a text.
    """

    score: Score

    def __call__(self, logprobs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        total, count = score_sum(self.score, chosen_texts(logprobs, batch), batch)
        loss = torch.where(logprobs.isnan().any(), torch.nan, count - total)  # nothing was chosen: skip the step
        return loss, count


@dataclass(frozen=True)
class GeneratedLoss:
    """1 - score of the text that is generated, per example. Piecewise constant: it has no gradient.

    Args:
        score: of a text.
    """

    score: Score

    def __call__(self, texts: Sequence[str], batch: MicroBatch) -> tuple[Tensor, Tensor]:
        total, count = score_sum(self.score, texts, batch)
        return count - total, count


OBJECTIVES: dict[str, Objective] = {"classification": classification, "lm": language_modeling}
