"""Metrics of a model on examples, shared out to the ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoscale.data.batch import MicroBatch
from zoscale.mesh import Mesh
from zoscale.metrics import COMPARED, TALLIED, Scored, score
from zoscale.models.answers import AnswerModel
from zoscale.models.generation import Generator
from zoscale.objectives import (
    Objective,
    by_example,
    chosen_texts,
    classification,
    language_modeling,
    option_scores,
    score_sum,
)

_LOSSES: Mapping[str, Objective] = {"loss": classification, "lm_loss": language_modeling}


@dataclass(frozen=True)
class Evaluation:
    """Metrics over a split; the same on every rank.

    Args:
        count: examples scored: all of them.
        metrics: by name. `loss` is the cross-entropy over the options, per example; `lm_loss` that of the right
            option's tokens, per token; those of `metrics.TALLIED` are of the labels that were chosen for all
            examples, those of `metrics.COMPARED` of all labels' scores; any other is the mean of
            `metrics.score(name)` over the examples.
    """

    count: int
    metrics: dict[str, float]

    @property
    def is_finite(self) -> bool:
        """Whether all metrics are numbers; losses of broken weights are not."""
        return all(map(math.isfinite, self.metrics.values()))

    def flat(self) -> dict[str, float]:
        """The count and the metrics in one mapping."""
        return {"count": self.count, **self.metrics}


@torch.no_grad()
def evaluate(
    model: AnswerModel,
    batches: Sequence[MicroBatch],
    mesh: Mesh,
    metrics: Sequence[str] = ("accuracy", "loss", "lm_loss"),
    *,
    generator: Generator | None = None,
) -> Evaluation:
    """Score every example once. A collective: all ranks call it with the same batches.

    Args:
        model: answers for micro-batches.
        batches: the examples with all their options.
        mesh: the ranks.
        metrics: `loss`, `lm_loss`, or a name in `metrics.TALLIED`, in `metrics.COMPARED` (if all examples have the same
            labels), or that `metrics.score` knows.
        generator: writes the answers that are scored; None = the best option is scored.

    Raises:
        ValueError: without examples; for a metric in `COMPARED` of examples with other labels than the first.
    """
    if not batches:
        raise ValueError("expected at least one micro-batch to evaluate, got none")
    mine, turns = mesh.share(len(batches))
    mine += [mesh.rank % len(batches)] * (turns - len(mine))
    means = [name for name in metrics if name not in TALLIED and name not in COMPARED]
    labels = _labels(batches) if TALLIED.keys() & set(metrics) else ()
    compared = [name for name in metrics if name in COMPARED]
    if compared:
        _check_shared(batches, compared)
    scored: dict[int, Scored] = {}
    table = torch.zeros(2 * len(means) + 3 * len(labels), turns, dtype=torch.float64, device=mesh.device)
    for turn, item in enumerate(mine):
        batch = batches[item].to(mesh.device)
        logprobs = model.answer_logprobs(batch)
        table[:, turn] = torch.stack(_sums(logprobs, batch, means, labels, generator))
        if compared:
            scored[item] = _scored(logprobs, batch)
    sums = [sum(row) for row in mesh.gather_items(table, len(batches)).tolist()]
    ratios, counts = sums[: 2 * len(means)], sums[2 * len(means) :]
    found = dict(zip(means, (total / n for total, n in zip(ratios[::2], ratios[1::2], strict=True)), strict=True))
    tally = list(zip(counts[::3], counts[1::3], counts[2::3], strict=True))
    found |= {name: TALLIED[name](tally) for name in metrics if name in TALLIED}
    if compared:
        everyone = {item: rows for own in mesh.gather_objects(scored) for item, rows in own.items()}
        rows = [row for item in range(len(batches)) for row in everyone[item]]
        found |= {name: COMPARED[name](rows) for name in compared}
    return Evaluation(sum(batch.num_examples for batch in batches), {name: found[name] for name in metrics})


def _labels(batches: Sequence[MicroBatch]) -> tuple[str, ...]:
    """Of the options of all examples, in their order."""
    found = dict.fromkeys(label for batch in batches for question in batch.questions for label in question.labels)
    if not found:
        raise ValueError("expected micro-batches with the texts of their examples, got tokens only: use an Encoder")
    return tuple(found)


def _check_shared(batches: Sequence[MicroBatch], metrics: Sequence[str]) -> None:
    labels = {question.labels for batch in batches for question in batch.questions}
    if len(labels) != 1:
        raise ValueError(f"expected examples that all have the same labels for {metrics[0]}, got {len(labels)} kinds")


def _scored(logprobs: Tensor, batch: MicroBatch) -> Scored:
    gold = [own.index(True) for own in by_example(batch.option_is_gold, batch)]
    return list(zip(by_example(option_scores(logprobs, batch), batch), gold, strict=True))


def _sums(
    logprobs: Tensor,
    batch: MicroBatch,
    metrics: Sequence[str],
    labels: Sequence[str],
    generator: Generator | None,
) -> list[Tensor]:
    """Sum and count of each metric; then how often each label is chosen and right, chosen, right."""
    texts: list[str] = []
    if labels or not _LOSSES.keys() >= set(metrics):
        texts = chosen_texts(logprobs, batch) if generator is None else generator.texts(batch)
    pairs = [
        _LOSSES[name](logprobs, batch) if name in _LOSSES else score_sum(score(name), texts, batch) for name in metrics
    ]
    right = [question.accepted[0] for question in batch.questions] if labels else []
    both = list(zip(texts, right, strict=True)) if labels else []
    counts = [
        float(count)
        for label in labels
        for count in (both.count((label, label)), texts.count(label), right.count(label))
    ]
    return [value for pair in pairs for value in pair] + [logprobs.new_tensor(n, dtype=torch.float64) for n in counts]
