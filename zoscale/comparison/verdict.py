"""Verdicts: which group is better for the same cost, and how sure that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import comb
from statistics import fmean

from zoscale.comparison.groups import Axis, Group, last_value, results
from zoscale.comparison.numbers import Spread, short
from zoscale.comparison.runs import Run

_RARE = 0.05  # chance of what is called clear
_EQUAL = 1.05  # costs up to this ratio are: the last step may not fit into a budget


@dataclass(frozen=True)
class Goal:
    """What is compared.

    Args:
        metric: full name of an evaluation metric, as `dev/accuracy`.
    """

    metric: str

    @property
    def lower_is_better(self) -> bool:
        """Whether less of it is better: of what is called a loss."""
        return self.metric.endswith("loss")

    def better(self, a: float, b: float) -> float:
        """The better of two values."""
        return min(a, b) if self.lower_is_better else max(a, b)

    def beats(self, a: float, b: float) -> bool:
        """Whether the first is better."""
        return a != b and self.better(a, b) == a

    def best_so_far(self, run: Run) -> dict[int, float]:
        """The best value up to each evaluation: what the run would have left there; of validation what it has left."""
        series = results(run, self.metric)
        return dict(zip(series, accumulate(series.values(), self.better), strict=True))

    def best(self, group: Group) -> Spread | None:
        """The best value of each run."""
        return Spread.of(last_value(self.best_so_far(run)) for run in group.runs)

    def worst_of(self, spread: Spread) -> float:
        """The worse end of the runs."""
        return spread.high if self.lower_is_better else spread.low

    def best_of(self, spread: Spread) -> float:
        """The better end of the runs."""
        return spread.low if self.lower_is_better else spread.high


@dataclass(frozen=True)
class Standing:
    """A group under a verdict.

    Args:
        group: the group.
        by_seed: the best value within the budget, the mean of the runs of a seed.
        value: the same over the runs.
        num_evaluations: within the budget, of each run: the more there are, the better is the best of them by chance.
        cost_to_target: mean cost after which a run has reached the target; None if there is none.
    """

    group: Group
    by_seed: Mapping[str, float]
    value: Spread
    num_evaluations: tuple[int, ...]
    cost_to_target: float | None


@dataclass(frozen=True)
class Duel:
    """Two groups on the seeds that both have: the same examples in the same order.

    Args:
        num_shared: seeds of both.
        num_won: on so many of them the first is better.
        margin: the first group's value less the second's: mean over the shared seeds.
    """

    num_shared: int
    num_won: int
    margin: float

    @classmethod
    def of(cls, first: Standing, second: Standing, goal: Goal) -> "Duel | None":
        """None without a shared seed."""
        shared = [seed for seed in first.by_seed if seed in second.by_seed]
        if not shared:
            return None
        pairs = [(first.by_seed[seed], second.by_seed[seed]) for seed in shared]
        return cls(len(shared), sum(goal.beats(a, b) for a, b in pairs), fmean(a - b for a, b in pairs))


@dataclass(frozen=True)
class Verdict:
    """Groups in order of the best value that they reach for the same cost.

    Args:
        axis: the cost.
        budget: the largest cost that every run has reached; of what is known at the ends of runs only, of any run.
        target: the value that every run reaches, the best of the worst one, if it is better than all of them started.
        standings: best first; groups whose cost was not logged are left out.
        certainty: `clear`, `separate, few seeds`, `failed seeds`, `within the seeds' band`, `one seed only`,
            `unequal costs`, `tie`, or `nothing to compare`.
        explanation: why.
    """

    axis: Axis
    budget: float
    target: float | None
    standings: tuple[Standing, ...]
    certainty: str
    explanation: str

    def duel(self, goal: Goal) -> Duel | None:
        """The best against the runner-up."""
        return Duel.of(self.standings[0], self.standings[1], goal) if len(self.standings) > 1 else None


def judge(groups: Sequence[Group], axis: Axis, goal: Goal) -> Verdict | None:
    """The verdict for one kind of cost; None if no group has logged it with the metric."""
    paid = {group.label: [_paid(run, axis, goal) for run in group.runs] for group in groups}
    known = [group for group in groups if all(paid[group.label])]
    if not known:
        return None
    ends = [costs[-1][0] for group in known for costs in paid[group.label]]
    at_ends = all(goal.metric not in run.metrics for group in known for run in group.runs)
    budget = max(ends) if at_ends else min(ends)
    target = _target([costs for group in known for costs in paid[group.label]], goal)
    standings = []
    for group in known:
        values = [_within(costs, budget) for costs in paid[group.label]]
        if (value := Spread.of(values)) is not None:
            cost = _cost_to(target, paid[group.label], goal)
            tries = tuple(sum(cost <= budget for cost, _ in costs) for costs in paid[group.label])
            standings.append(Standing(group, _by_seed(group, values), value, tries, cost))
    sign = 1 if goal.lower_is_better else -1
    standings.sort(key=lambda standing: (sign * standing.value.mean, standing.group.label))
    certainty = (_unequal(standings, paid) if at_ends else None) or _certainty(standings, goal)
    return Verdict(axis, budget, target, tuple(standings), *certainty)


def _paid(run: Run, axis: Axis, goal: Goal) -> list[tuple[float, float]]:
    """(cost, best value so far) of each evaluation."""
    best = goal.best_so_far(run)
    return [(cost, best[step]) for step, cost in axis.costs(run, best).items()]


def _within(costs: Sequence[tuple[float, float]], budget: float) -> float | None:
    """The best value for at most so much."""
    return next((value for cost, value in reversed(costs) if cost <= budget), None)


def _by_seed(group: Group, values: Sequence[float | None]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for run, value in zip(group.runs, values, strict=True):
        if value is not None:
            found.setdefault(run.seed, []).append(value)
    return {seed: fmean(members) for seed, members in found.items()}


def _target(runs: Sequence[Sequence[tuple[float, float]]], goal: Goal) -> float | None:
    """The best of the worst run, which all reach, if none of them started there."""
    reached = [run[-1][1] for run in runs]
    target = max(reached) if goal.lower_is_better else min(reached)
    return target if all(goal.beats(target, run[0][1]) for run in runs) else None


def _cost_to(target: float | None, runs: Sequence[Sequence[tuple[float, float]]], goal: Goal) -> float | None:
    if target is None:
        return None
    return fmean(next(cost for cost, value in run if not goal.beats(target, value)) for run in runs)


def _unequal(
    standings: Sequence[Standing], paid: Mapping[str, Sequence[Sequence[tuple[float, float]]]]
) -> tuple[str, str] | None:
    """What is known at the ends only: whether the best has paid more there than another."""
    ends = {s.group.label: [costs[-1][0] for costs in paid[s.group.label]] for s in standings}
    first, *others = ends
    cheaper = [label for label in others if max(ends[first]) > _EQUAL * min(ends[label])]
    if not cheaper:
        return None
    much = f"{first} has paid {short(max(ends[first]))}, more than {_and(cheaper)}"
    return "unequal costs", f"{much}: what the latter would reach for as much is not known"


def _certainty(standings: Sequence[Standing], goal: Goal) -> tuple[str, str]:
    if len(standings) < 2:
        return "nothing to compare", "there is one group only"
    first, second = standings[:2]
    if first.value.mean == second.value.mean:
        return "tie", f"{first.group.label} and {second.group.label} reach the same mean"
    single = [s.group.label for s in (first, second) if len(s.by_seed) < 2]
    if single:
        return "one seed only", f"{_and(single)}: one seed, so nothing is known of the noise"
    worst = goal.worst_of(first.value)
    overlapping = [s.group.label for s in standings[1:] if not goal.beats(worst, goal.best_of(s.value))]
    if overlapping:
        return "within the seeds' band", f"the worst seed does not beat the best seed of {_and(overlapping)}"
    counts = _and(sorted({str(len(s.by_seed)) for s in standings}))
    parted = f"its worst seed ({short(worst)}) beats every seed of the others ({counts} seeds each)"
    if failed := [f"{s.group.label} ({s.group.num_seeds})" for s in standings if s.group.failed]:
        return "failed seeds", f"{parted}, but some seeds failed: {_and(failed)} are left"
    chance = max(chance_of_separation(len(first.by_seed), len(s.by_seed)) for s in standings[1:])
    if chance > _RARE:
        return "separate, few seeds", f"{parted}, which of two equal groups one does by chance in {chance:.0%} of cases"
    return "clear", f"{parted}: by chance {chance:.1%}"


def chance_of_separation(n: int, m: int) -> float:
    """Of groups of n and m seeds of one distribution, that all of one beat all of the other: 2 n! m! / (n + m)!."""
    return 2 / comb(n + m, n)


def _and(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
