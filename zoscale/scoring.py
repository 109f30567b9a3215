"""Scores of single examples beside the metrics of all: which options the model prefers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from zoscale.batch import MicroBatch
from zoscale.evaluate import Evaluation, evaluate
from zoscale.mesh import Mesh
from zoscale.models import AnswerModel
from zoscale.objectives import option_scores, predictions
from zoscale.run_directory import write_text
from zoscale.tasks import Example


@dataclass(frozen=True)
class Prediction:
    """What the model made of one example.

    Args:
        index: of the example in its split, from 0.
        prompt: as it was put, before it was cut to the longest row.
        options: the possible continuations.
        scores: mean log-probability of each option's tokens.
        prediction: number of the option that scores highest.
        gold: number of the right one.
    """

    index: int
    prompt: str
    options: tuple[str, ...]
    scores: tuple[float, ...]
    prediction: int
    gold: int


class RecordingModel(AnswerModel):
    """Answers as another model does, and keeps the scores of every micro-batch that it was asked about.

    Args:
        answers: the model that answers.
    """

    def __init__(self, answers: AnswerModel) -> None:
        super().__init__(answers.module, answers.model)
        self.scored: list[list[tuple[tuple[float, ...], int]]] = []

    def answer_logprobs(self, batch: MicroBatch) -> Tensor:
        """See `AnswerModel`."""
        logprobs = super().answer_logprobs(batch)
        scores: list[list[float]] = [[] for _ in range(batch.num_examples)]
        for example, score in zip(batch.option_example.tolist(), option_scores(logprobs, batch).tolist(), strict=True):
            scores[example].append(score)
        best = predictions(logprobs, batch).tolist()
        self.scored.append([(tuple(own), number) for own, number in zip(scores, best, strict=True)])
        return logprobs


def score(
    answers: AnswerModel, examples: Sequence[Example], batches: Sequence[MicroBatch], mesh: Mesh
) -> tuple[Evaluation, list[Prediction]]:
    """Metrics and the prediction of every example; the same on every rank, and at any number of ranks. A collective.

    Args:
        answers: the model.
        examples: in the order of their split.
        batches: of the examples, in their order.
        mesh: the ranks.
    """
    recording = RecordingModel(answers)
    result = evaluate(recording, batches, mesh)
    mine, _ = mesh.share(len(batches))
    own = dict(zip(mine, recording.scored, strict=False))  # turns beyond a rank's own repeat work
    scored = {item: rows for part in mesh.gather_objects(own) for item, rows in part.items()}
    rows = [row for item in range(len(batches)) for row in scored[item]]
    found = [
        Prediction(index, example.prompt, example.options, scores, best, example.gold)
        for index, (example, (scores, best)) in enumerate(zip(examples, rows, strict=True))
    ]
    return result, found


def write_predictions(path: Path, found: Iterable[Prediction]) -> None:
    """One JSON object per line."""
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in found))
