"""Scores of single examples beside the metrics of all: which options the model prefers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zoscale.data.batch import MicroBatch
from zoscale.evaluate import Evaluation, evaluate
from zoscale.mesh import Mesh
from zoscale.models.answers import AnswerModel
from zoscale.models.generation import Generator
from zoscale.objectives import by_example, option_scores, predictions
from zoscale.run_directory import write_text
from zoscale.tasks import Example


@dataclass(frozen=True)
class Prediction:
    """What the model made of one example.

    Args:
        index: of the example among those of the validation split, from 0; of dev and train, which are cut from one
            split, its place in the order in which they were drawn.
        prompt: as it was put, before it was cut to the longest row.
        options: the possible continuations.
        scores: mean log-probability of each option's tokens.
        prediction: number of the option that scores highest.
        gold: number of the right one.
        answer: what the metrics read: the label of that option, or the text that was generated.
    """

    index: int
    prompt: str
    options: tuple[str, ...]
    scores: tuple[float, ...]
    prediction: int
    gold: int
    answer: str


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
        scores = by_example(option_scores(logprobs, batch), batch)
        best = predictions(logprobs, batch).tolist()
        self.scored.append([(tuple(own), number) for own, number in zip(scores, best, strict=True)])
        return logprobs


class RecordingGenerator(Generator):
    """Writes answers, and keeps those of every micro-batch."""

    def __init__(self, answers: AnswerModel, tokenizer: PreTrainedTokenizerBase, mesh: Mesh) -> None:
        super().__init__(answers, tokenizer, mesh)
        self.written: list[list[str]] = []

    def texts(self, batch: MicroBatch) -> list[str]:
        """See `Generator`."""
        found = super().texts(batch)
        self.written.append(found)
        return found


def score(
    answers: AnswerModel,
    examples: Sequence[tuple[int, Example]],
    batches: Sequence[MicroBatch],
    mesh: Mesh,
    metrics: Sequence[str],
    *,
    generator: RecordingGenerator | None = None,
) -> tuple[Evaluation, list[Prediction]]:
    """Metrics and the prediction of every example; the same on every rank, and at any number of ranks. A collective.

    Args:
        answers: the model.
        examples: with their numbers, in the order of the batches.
        batches: of the examples.
        mesh: the ranks.
        metrics: see `evaluate`.
        generator: see `evaluate`.
    """
    recording = RecordingModel(answers)
    result = evaluate(recording, batches, mesh, metrics, generator=generator)
    mine, _ = mesh.share(len(batches))
    written: Sequence[Sequence[str | None]] = [[None] * len(rows) for rows in recording.scored]
    if generator is not None:
        written = generator.written
    both = [list(zip(rows, texts, strict=True)) for rows, texts in zip(recording.scored, written, strict=True)]
    own = dict(zip(mine, both, strict=False))  # turns beyond a rank's own repeat work
    scored = {item: rows for part in mesh.gather_objects(own) for item, rows in part.items()}
    rows = [row for item in range(len(batches)) for row in scored[item]]
    found = [
        _prediction(number, example, scores, best, text)
        for (number, example), ((scores, best), text) in zip(examples, rows, strict=True)
    ]
    return result, sorted(found, key=lambda prediction: prediction.index)


def _prediction(number: int, example: Example, scores: tuple[float, ...], best: int, text: str | None) -> Prediction:
    answer = example.labels[best] if text is None else text
    return Prediction(number, example.prompt, example.options, scores, best, example.gold, answer)


def write_predictions(path: Path, found: Iterable[Prediction]) -> None:
    """One JSON object per line."""
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in found))
