"""What the loop keeps of its own progress: `BestOnDev`, the step that a run leaves, by which metric, and `Skips`."""

from dataclasses import dataclass

from zoscale.config import ConfigError, RunConfig, did_you_mean, show
from zoscale.evaluate import Evaluation
from zoscale.objectives import OBJECTIVES
from zoscale.tasks import Task


@dataclass(frozen=True)
class Score:
    """An evaluation on dev and the step before which it was taken."""

    step: int
    dev: Evaluation


class BestOnDev:
    """The best of the evaluations on dev; of equals that of the lower loss, else the earlier one.

    Args:
        metric: that decides; the less the better if its name ends with `loss`.
        first_step: weights of before it are no result.
    """

    def __init__(self, metric: str, first_step: int = 0) -> None:
        self.score: Score | None = None
        self._metric = metric
        self._first_step = first_step

    def consider(self, score: Score) -> bool:
        """Whether a score is the best so far; if so it is remembered."""
        is_best = score.step >= self._first_step and (self.score is None or self._better(score.dev, self.score.dev))
        if is_best:
            self.score = score
        return is_best

    def _better(self, a: Evaluation, b: Evaluation) -> bool:
        if not (a.is_finite and b.is_finite):
            return a.is_finite
        new, old = a.metrics[self._metric], b.metrics[self._metric]
        if new == old and not self._metric.endswith("loss"):
            return bool(a.metrics.get("loss", 0.0) < b.metrics.get("loss", 0.0))
        return bool(new < old) if self._metric.endswith("loss") else bool(new > old)


def evaluated(config: RunConfig, task: Task) -> tuple[str, ...]:
    """The metrics of an evaluation: the task's, and the score that is trained for."""
    is_known = config.objective in OBJECTIVES or config.objective in task.metrics
    return task.metrics if is_known else (*task.metrics, config.objective)


def examined(config: RunConfig, task: Task) -> Task:
    """The task with the metric that chooses the weights.

    Raises:
        ConfigError: if it is not evaluated.
    """
    if (metric := config.train.select_by) is not None:
        known = evaluated(config, task)
        if metric not in known:
            remedy = did_you_mean(metric, known, "choose one of them")
            raise ConfigError(f"train.select_by of {', '.join(known)}", show(metric), remedy)
        task.select_by = metric
    return task


class Skips:
    """Counts the steps that a non-finite loss has skipped.

    Args:
        most_in_row: more of them in a row end the run.
    """

    def __init__(self, most_in_row: int) -> None:
        self.total = 0
        self._in_row = 0
        self._most_in_row = most_in_row

    def count(self, step: int, *, skipped: bool) -> None:
        """Count a step.

        Raises:
            FloatingPointError: if too many in a row were skipped.
        """
        self.total += skipped
        self._in_row = self._in_row + 1 if skipped else 0
        if self._in_row > self._most_in_row:
            raise FloatingPointError(
                f"the loss was not finite for {self._in_row} steps in a row, up to step {step}; lower optimizer.lr or "
                "estimator.tau, or compute in bfloat16 or float32"
            )
