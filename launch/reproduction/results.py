"""`Results`: the finished runs of a study: which learning rate dev chose, and what the runs of its seeds reached."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reproduction.runner import summary_of
from reproduction.study import Cell, Study, select_by
from zoscale.comparison.numbers import Spread
from zoscale.comparison.verdict import Goal
from zoscale.config import ConfigError


@dataclass(frozen=True)
class Choice:
    """The learning rate of a method that was best on dev with the first seed.

    Args:
        lr: the smallest of the best.
        num_tried: learning rates whose runs are finished.
        num_wanted: of the preset.
        at_edge: whether it is the smallest or the largest of several: a wider grid could do better.
    """

    lr: float
    num_tried: int
    num_wanted: int
    at_edge: bool


def choose(scores: Mapping[float, float], grid: list[float], goal: Goal) -> Choice | None:
    """The choice among learning rates by their scores on dev; None without a score.

    Args:
        scores: by learning rate, of the runs that are finished.
        grid: all learning rates.
        goal: whether less is better.
    """
    if not scores:
        return None
    best = sorted(scores)[0]
    for lr in sorted(scores):
        best = lr if goal.beats(scores[lr], scores[best]) else best
    return Choice(best, len(scores), len(grid), len(grid) > 1 and best in (min(grid), max(grid)))


class Results:
    """What the runs of a study have left so far.

    Args:
        study: whose run directories are read.

    Raises:
        ConfigError: without dev examples.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.goal = Goal("dev/accuracy")
        for cell in self.tuning():
            if cell.config.data.num_dev == 0:
                got = "data.num_dev=0"
                raise ConfigError("dev examples, which choose the learning rate", got, "raise data.num_dev")
            self.goal = Goal(f"dev/{select_by(cell.config)}")

    @property
    def metric(self) -> str:
        """Name of the metric that decides."""
        return self.goal.metric.removeprefix("dev/")

    def tuning(self) -> list[Cell]:
        """The runs that choose the learning rates: all of them with the first seed."""
        return [cell for scheme, method in self.pairs() for cell in self.grid(scheme, method)]

    def counted(self) -> list[Cell]:
        """The runs that count: the chosen learning rates with all seeds."""
        return [cell for scheme, method in self.pairs() for cell in self.of(scheme, method)]

    def pairs(self) -> list[tuple[str, str]]:
        """(scheme, method) of all cells."""
        return [(scheme, method) for scheme in self.study.schemes for method in self.study.methods
                if method in self.study.lrs[scheme]]  # fmt: skip

    def grid(self, scheme: str, method: str) -> list[Cell]:
        """A method's runs with the first seed."""
        return self.study.cells(scheme, method, self.study.seeds[:1], self.study.lrs[scheme][method])

    def choice(self, scheme: str, method: str) -> Choice | None:
        """The learning rate of a method so far."""
        if method not in self.study.lrs[scheme]:
            return None
        scores = {cell.lr: summary["dev"][self.metric] for cell in self.grid(scheme, method)
                  if (summary := summary_of(cell)) is not None}  # fmt: skip
        return choose(scores, self.study.lrs[scheme][method], self.goal)

    def of(self, scheme: str, method: str) -> list[Cell]:
        """The runs of the chosen learning rate; none before one is finished."""
        choice = self.choice(scheme, method)
        return self.study.cells(scheme, method, self.study.seeds, [choice.lr]) if choice else []

    def finished(self, scheme: str, method: str) -> list[tuple[Cell, dict[str, Any]]]:
        """Those that have ended, with their summaries."""
        return [(cell, summary) for cell in self.of(scheme, method) if (summary := summary_of(cell)) is not None]

    def validation(self, scheme: str, method: str, when: str = "chosen") -> Spread | None:
        """The metric on validation, over the seeds."""
        return Spread.of(row["validation"][when][self.metric] for _, row in self.finished(scheme, method))

    def missing(self) -> list[Cell]:
        """Cells that have not ended yet, as far as they are known."""
        known = {cell.config.run_dir: cell for cell in [*self.tuning(), *self.counted()]}
        return [cell for cell in known.values() if summary_of(cell) is None]
