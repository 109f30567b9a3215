"""`Comparison`: everything that the table, the JSON and the report show."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zoscale.comparison.groups import AXES, Group, differences, evaluations, group_runs, last_value
from zoscale.comparison.numbers import Spread
from zoscale.comparison.runs import Run
from zoscale.comparison.verdict import Goal, Verdict, judge
from zoscale.config import ConfigError

_BROKEN = ("FAILED", "KILLED")
_EXAM = ("data.num_dev", "data.num_validation", "data.num_demonstrations")
"""Parameters beside the task's that decide what a model is asked in an evaluation."""


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and what is to be said of them.

    Args:
        title: what was compared.
        goal: the metric that decides.
        metrics: full names of all evaluation metrics of the split of the goal.
        groups: runs that differ only in their seed, together.
        verdicts: one per kind of cost that was logged.
        notes: what a reader must know before believing a verdict.
    """

    title: str
    goal: Goal
    metrics: tuple[str, ...]
    groups: tuple[Group, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    @property
    def differences(self) -> dict[str, list[str]]:
        """Parameters that are not the same in all groups, with their values by group."""
        return differences(self.groups)

    def outcome(self, group: Group) -> tuple[Spread | None, Spread | None]:
        """The goal's metric on validation: before training, and of the weights that were chosen."""
        name = self.goal.metric.split("/", 1)[-1]
        chosen = Spread.of(_chosen(run, name) for run in group.runs)
        return group.last(f"validation/before/{name}"), chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "title": self.title,
            "metric": self.goal.metric,
            "lower_is_better": self.goal.lower_is_better,
            "verdicts": [_verdict(verdict) for verdict in self.verdicts],
            "groups": [self._group(group) for group in self.groups],
            "differences": {name: _by_group(values, self.groups) for name, values in self.differences.items()},
            "notes": list(self.notes),
        }

    def _group(self, group: Group) -> dict[str, Any]:
        before, chosen = self.outcome(group)
        return {
            "label": group.label,
            "seeds": group.seeds,
            "runs": [{"id": run.id, "name": run.name, "status": run.status} for run in group.runs],
            "validation": {"before": _spread(before), "chosen": _spread(chosen)},
            "best": _spread(self.goal.best(group)),
            "totals": {axis.name: _spread(group.total(axis)) for axis in AXES},
            "tokens_per_second": _spread(group.last("train/tokens_per_second")),
            "ranks": group.ranks,
            "seconds_per_step": group.seconds_per_step,
        }


def compare(runs: Sequence[Run], title: str, metric: str | None) -> Comparison:
    """Group the runs and judge them. Runs that broke off are left out, unless all did.

    Args:
        runs: at least one.
        title: what was compared.
        metric: name of an evaluation metric (`accuracy`), or the full name of any metric; None = the one by which the
            runs chose their weights.

    Raises:
        ConfigError: if no run has logged the metric, or the runs do not agree on one.
    """
    goal = Goal(_full_name(runs, metric if metric is not None else _selection(runs)))
    measured = [run for run in runs if evaluations(run, goal.metric)]
    kept = [run for run in measured if run.status not in _BROKEN] or measured
    groups = group_runs(kept)
    verdicts = [verdict for axis in AXES if (verdict := judge(groups, axis, goal)) is not None]
    split = goal.metric.rpartition("/")[0]
    names = {name for run in kept for name in _evaluated(run) if name.rpartition("/")[0] == split} | {goal.metric}
    notes = (*_notes(groups, verdicts, goal), *_left_out([run for run in runs if run not in kept], goal))
    return Comparison(title, goal, tuple(sorted(names)), tuple(groups), tuple(verdicts), notes)


def _selection(runs: Sequence[Run]) -> str:
    found = sorted({run.tags.get("select_by", "") for run in runs})
    if len(found) == 1 and found[0]:
        return found[0]
    got = ", ".join(name or "none" for name in found)
    names = sorted({name.rpartition("/")[2] for run in runs for name in _evaluated(run)})
    raise ConfigError("runs that were chosen by one metric", got, f"choose with --metric, of: {', '.join(names)}")


def _full_name(runs: Sequence[Run], metric: str) -> str:
    """Of dev, where the weights are chosen, if a run has one; else of validation."""
    for name in (metric, f"dev/{metric}", f"validation/{metric}"):
        if any(evaluations(run, name) for run in runs):
            return name
    names = sorted({name for run in runs for name in _evaluated(run)})
    if not names:
        raise ConfigError("a run that has been evaluated", "none", "wait for its first evaluation")
    raise ConfigError("a metric that a run has logged", metric, f"choose with --metric, of: {', '.join(names)}")


def _evaluated(run: Run) -> Iterable[str]:
    """Full names of a run's evaluation metrics; those of validation without `before` and `final`."""
    for name in run.metrics:
        split, *_, metric = name.split("/")
        if "/" in name and split not in ("train", "system") and not split.startswith("rank_") and metric != "seconds":
            yield f"{split}/{metric}"


def _chosen(run: Run, metric: str) -> float | None:
    """`best` is there only if the best weights were not the last."""
    for when in ("best", "final"):
        if series := run.metrics.get(f"validation/{when}/{metric}"):
            return last_value(series)
    return None


def _notes(groups: Sequence[Group], verdicts: Sequence[Verdict], goal: Goal) -> Iterable[str]:
    exam = {key for group in groups for key in group.params if key.startswith("task.") or key in _EXAM}
    if other := sorted(key for key in exam if len({group.params.get(key) for group in groups}) > 1):
        yield f"The groups were scored on other examples or prompts ({', '.join(other)}): some may be easier."
    for group in groups:
        if len(group.seeds) == 1:
            yield f"{group.label} has one seed: nothing is known of its noise."
        if len(group.runs) > len(group.seeds):
            yield f"{group.label} has {len(group.runs)} runs and {len(group.seeds)} different seeds; every run counts."
        if len(ends := {max(evaluations(run, goal.metric)) for run in group.runs}) > 1:
            yield f"The runs of {group.label} have different lengths; its curves end at step {min(ends)}."
    for status, names in _by_status(run for group in groups for run in group.runs).items():
        yield f"{status}: {', '.join(names)}."
    judged = {standing.group.label for verdict in verdicts for standing in verdict.standings}
    if missing := [group.label for group in groups if group.label not in judged]:
        yield f"Without running totals of their cost, so not judged: {', '.join(missing)}."
    commits = sorted({run.tags["git_commit"] for group in groups for run in group.runs if "git_commit" in run.tags})
    if len(commits) > 1:
        yield f"The runs are of different commits: {', '.join(commits)}."


def _left_out(runs: Sequence[Run], goal: Goal) -> Iterable[str]:
    """Notes on runs that are in no group."""
    broken = [run for run in runs if evaluations(run, goal.metric)]
    for status, names in _by_status(broken).items():
        yield f"{status}: {', '.join(names)}. Left out, as a comparison goes as far as its shortest run."
    if empty := [run.name for run in runs if run not in broken]:
        yield f"Left out, as they have no {goal.metric}: {', '.join(empty)}."


def _by_status(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Names of the runs that have not finished."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.status != "FINISHED":
            found.setdefault(run.status, []).append(run.name)
    return found


def _by_group(values: Sequence[str], groups: Sequence[Group]) -> dict[str, str]:
    return {group.label: value for group, value in zip(groups, values, strict=True)}


def _spread(spread: Spread | None) -> dict[str, float] | None:
    return asdict(spread) if spread is not None else None


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "per": verdict.axis.unit,
        "best": verdict.standings[0].group.label,
        "certainty": verdict.certainty,
        "explanation": verdict.explanation,
        "budget": verdict.budget,
        "target": verdict.target,
        "standings": [
            {
                "label": s.group.label,
                "value": asdict(s.value),
                "by_seed": dict(s.by_seed),
                "cost_to_target": s.cost_to_target,
            }
            for s in verdict.standings
        ],
    }
