"""What a method pays for an accuracy: forwards until it is reached, and the comparison per forward and per second."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from reproduction.markdown import seeds, table
from reproduction.results import Results
from reproduction.runner import summary_of
from reproduction.study import cost_of_step
from zoscale.comparison import tables
from zoscale.comparison.comparison import compare
from zoscale.comparison.numbers import short
from zoscale.comparison.page import render
from zoscale.comparison.pictures import write_pictures
from zoscale.comparison.runs import Run, read_runs
from zoscale.comparison.verdict import Goal

MARKS = ("zo_sgd", "fo_adamw")
"""Methods whose best accuracy on dev the others are timed to."""


@dataclass(frozen=True)
class Paid:
    """A finished run and what its steps cost.

    Args:
        run: as it was logged.
        cost_of_step: in forward equivalents of the batch.
    """

    run: Run
    cost_of_step: int

    def forwards_until(self, target: float, goal: Goal) -> int | None:
        """Forward equivalents until the best weights so far are as good as the target on dev; None = never."""
        best = goal.best_so_far(self.run)
        step = next((step for step, value in best.items() if not goal.beats(target, value)), None)
        return None if step is None else step * self.cost_of_step


def mean_best(runs: Sequence[Paid], goal: Goal) -> float:
    """The best value of each run on dev, their mean."""
    return fmean(list(goal.best_so_far(paid.run).values())[-1] for paid in runs)


def runs_of(results: Results, scheme: str) -> dict[str, list[Paid]]:
    """The finished runs that count, by method."""
    found = {}
    for method in results.study.methods:
        cells = [cell for cell, _ in results.finished(scheme, method)]
        runs, _ = read_runs([str(cell.config.run_dir) for cell in cells], "")
        if runs:
            found[method] = [Paid(run, cost_of_step(cell.config)) for run, cell in zip(runs, cells, strict=True)]
    return found


def broken_of(results: Results, scheme: str) -> list[Run]:
    """The runs that count, have begun and have no result: failed, if they were not told to stop."""
    cells = [cell for method in results.study.methods for cell in results.of(scheme, method)]
    folders = [cell.config.run_dir for cell in cells if summary_of(cell) is None]
    begun = [path for path in folders if all((path / name).is_file() for name in ("tracking.json", "metrics.jsonl"))]
    runs, _ = read_runs([str(path) for path in begun], "")
    return [run if run.status == "KILLED" else replace(run, status="FAILED") for run in runs]


def until_table(results: Results, runs: Mapping[str, Sequence[Paid]]) -> str:
    """Forwards of each method until the accuracies of `MARKS`: means over the seeds, if all of them get there."""
    methods, goal = results.study.methods, results.goal
    marks = {mark: mean_best(runs[mark], goal) for mark in MARKS if mark in runs}
    head = [f"until {methods[mark]['title']}'s {100 * best:.1f}" for mark, best in marks.items()]
    rows = [["method", f"best {results.metric} on dev", *head]]
    for method, own in runs.items():
        cells = [forwards_text([paid.forwards_until(best, goal) for paid in own]) for best in marks.values()]
        few = f" ({seeds(len(own), asked)})" if len(own) < (asked := len(results.study.seeds)) else ""
        rows.append([methods[method]["title"], f"{100 * mean_best(own, goal):.1f}{few}", *cells])
    return table(rows)


def forwards_text(costs: Sequence[int | None]) -> str:
    """The mean, or how many runs get there."""
    known = [cost for cost in costs if cost is not None]
    if len(known) == len(costs):
        return short(sum(known) / len(known))
    return f"{len(known)} of {len(costs)} runs" if known else "not reached"


def write_comparison(results: Results, scheme: str, runs: Mapping[str, Sequence[Paid]], folder: Path) -> str:
    """The report of `zoscale compare` over the runs that count; returns its verdicts as Markdown."""
    title = f"{results.study.schemes[scheme].title}, equal forwards"
    finished = [paid.run for own in runs.values() for paid in own]
    comparison = compare([*finished, *broken_of(results, scheme)], title, results.goal.metric)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(render(comparison), encoding="utf-8")
    write_pictures(comparison, folder)
    lines = [table(tables.verdict_table(comparison)), *(f"- {line}" for line in tables.explanations(comparison))]
    return "\n".join([*lines, "", f"![learning curves]({folder.name}/learning.png)", ""])
