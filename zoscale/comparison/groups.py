"""Groups of runs that differ only in their seed, and their curves over what they cost."""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zoscale.comparison.numbers import Spread
from zoscale.comparison.runs import Run, Series
from zoscale.passes import forward_equivalents

_NOT_COMPUTED = re.compile(
    r"(name|seed|output_dir|resume|overwrite|(checkpoint|tracking)\..*|runtime\.(timeout_minutes|stall_seconds))$"
)
"""Parameters that change where results go or how long one waits, but neither results nor speed."""

BROKEN = ("FAILED", "KILLED")
"""Statuses of runs that broke off."""

_LABEL_FIRST = ("optimizer.name", "estimator.name", "probe.name", "optimizer.lr")
_MOST_IN_LABEL = 4
_MOST_POINTS = 400  # of a curve


@dataclass(frozen=True)
class Axis:
    """What is paid.

    Args:
        unit: one of it.
        name: of the total, in the JSON.
        label: of a plot's axis.
        metrics: the running totals that are logged, and what one of each counts for. A run that has not logged the
            first is not judged; others that it has not logged are 0.
    """

    unit: str
    name: str
    label: str
    metrics: Mapping[str, int]

    def totals(self, run: Run) -> Series:
        """What a run had paid at each step at which it was logged."""
        first, *_ = self.metrics
        steps = list(run.metrics.get(first, ()))
        paid = np.zeros(len(steps))
        for metric, worth in self.metrics.items():
            series = run.metrics.get(metric, {})
            paid += worth * np.interp(steps, [0, *series], [0.0, *series.values()])
        return dict(zip(steps, paid.tolist(), strict=True))

    def costs(self, run: Run, steps: Iterable[int]) -> dict[int, float]:
        """The cost of a run up to each of some steps, as far as it is known."""
        totals = self.totals(run)
        if not totals:
            return {}
        known = [step for step in steps if step <= max(totals)]
        return dict(zip(known, np.interp(known, [0, *totals], [0.0, *totals.values()]).tolist(), strict=True))


AXES = (
    Axis(
        "forward equivalent",
        "forward_equivalents",
        "forward equivalents",
        {"train/forwards": forward_equivalents(1, 0), "train/backwards": forward_equivalents(0, 1)},
    ),
    Axis("second", "seconds", "seconds of training", {"train/seconds": 1}),
    Axis("device (GPU) hour", "device_hours", "device (GPU) hours", {"train/device_hours": 1}),
)


@dataclass(frozen=True)
class Curve:
    """A metric over a cost, at the steps that all runs of a group have.

    Args:
        steps: int [n].
        x: cost, the mean of the runs: float [n].
        mean: of the runs: float [n].
        low: smallest of the runs: float [n].
        high: largest of the runs: float [n].
        num: of runs.
    """

    steps: list[int]
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    num: int


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Args:
        label: short and different from the other groups'.
        params: what the runs have in common and what decides results or speed.
        runs: at least one.
        failed: seeds whose runs have all failed.
    """

    label: str
    params: Mapping[str, str]
    runs: tuple[Run, ...]
    failed: tuple[str, ...] = ()

    @cached_property
    def seeds(self) -> list[str]:
        """The different seeds."""
        return _seeds(self.runs)

    @property
    def num_seeds(self) -> str:
        """How many; of how many, if some have failed: `2 of 3`."""
        num = len(set(self.seeds).difference(self.failed))
        return f"{num} of {num + len(self.failed)}" if self.failed else str(num)

    @property
    def seed_count(self) -> str:
        """How many seeds, for a legend."""
        return "one seed" if self.num_seeds == "1" else f"{self.num_seeds} seeds"

    def curve(self, metric: str, axis: Axis, *, window: int = 1) -> Curve | None:
        """A metric over a cost; None if a run lacks one of them.

        Args:
            metric: its name.
            axis: the cost.
            window: points of each run's running mean.
        """
        series = [smooth(evaluations(run, metric), window) for run in self.runs]
        costs = [axis.costs(run, one) for run, one in zip(self.runs, series, strict=True)]
        steps = _thinned(sorted(set.intersection(*map(set, costs))))
        if not steps:
            return None
        table = np.array([[one[step] for step in steps] for one in series])
        x = np.array([[one[step] for step in steps] for one in costs]).mean(0)
        low, mean, high = table.min(0), table.mean(0), table.max(0)
        return Curve(steps, x.tolist(), mean.tolist(), low.tolist(), high.tolist(), len(self.runs))

    def last(self, metric: str) -> Spread | None:
        """The last value of a metric, over the runs."""
        return Spread.of(last_value(run.metrics.get(metric)) for run in self.runs)

    def total(self, axis: Axis) -> Spread | None:
        """What the runs have paid in the end."""
        return Spread.of(last_value(axis.totals(run)) for run in self.runs)

    @cached_property
    def ranks(self) -> list[dict[str, float]]:
        """By rank, means over the runs: `tokens_per_second`, `peak_memory_bytes`, `gathered_bytes_per_step`."""
        numbers = {int(found[1]) for run in self.runs for name in run.metrics if (found := _RANK.match(name))}
        return [self._rank(number) for number in sorted(numbers)]

    def _rank(self, number: int) -> dict[str, float]:
        found = {"rank": float(number)}
        for name, typical in _TYPICAL.items():
            series = [run.metrics.get(f"rank_{number}/{name}") for run in self.runs]
            if value := Spread.of(typical(one.values()) for one in series if one):
                found[name] = value.mean
        return found

    @cached_property
    def seconds_per_step(self) -> dict[str, float]:
        """The split of the time, mean over ranks and runs; evaluations and their like are spread over the steps."""
        splits = [_split(run) for run in self.runs]
        phases = list(dict.fromkeys(name for split in splits for name in split))
        return {name: sum(split.get(name, 0.0) for split in splits) / len(splits) for name in phases}


_TYPICAL: dict[str, Callable[[Iterable[float]], float]] = {
    "tokens_per_second": statistics.median,
    "peak_memory_bytes": lambda values: list(values)[-1],  # these two are of all steps so far
    "gathered_bytes_per_step": lambda values: list(values)[-1],
}
_RANK = re.compile(r"rank_(\d+)/")
_PHASE = re.compile(r"rank_\d+/seconds_per_step/(\w+)$")


def _thinned(steps: list[int]) -> list[int]:
    """Evenly as many as can be seen, the last among them."""
    stride = -(-len(steps) // _MOST_POINTS) or 1
    return steps[::-1][::stride][::-1]


def evaluations(run: Run, metric: str) -> Series:
    """The points of a curve: finite; `validation/X` is made of `validation/before/X` and `validation/final/X`."""
    parts = metric.split("/", 1)
    names = [metric] if metric in run.metrics else [f"{parts[0]}/{when}/{parts[-1]}" for when in ("before", "final")]
    found = {step: value for name in names for step, value in run.metrics.get(name, {}).items()}
    return {step: value for step, value in sorted(found.items()) if np.isfinite(value)}


def results(run: Run, metric: str) -> Series:
    """What a run may be judged by: the values of a metric; of `validation/X` one, of the weights that it has left."""
    if metric in run.metrics:
        return evaluations(run, metric)
    split, _, name = metric.partition("/")
    for when in ("best", "final"):  # `best` is there only if the best weights were not the last
        if series := run.metrics.get(f"{split}/{when}/{name}"):
            last = max(series)
            return {last: series[last]} if np.isfinite(series[last]) else {}
    return {}


def smooth(series: Series, window: int) -> Series:
    """The running mean over the last `window` points."""
    values = list(series.values())
    return {step: float(np.mean(values[max(0, place + 1 - window) : place + 1])) for place, step in enumerate(series)}


def group_runs(runs: Sequence[Run], left_out: Sequence[Run] = ()) -> list[Group]:
    """Groups in the order of their first runs, with labels made of what differs; of those left out, who has failed."""
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run), []).append(run)
    params = [dict(key) for key in found]
    labelled = zip(_labels(params), params, found.items(), strict=True)
    return [
        Group(name, own, tuple(members), _failed([*members, *(run for run in left_out if _key(run) == key)]))
        for name, own, (key, members) in labelled
    ]


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Parameters that are not the same in all groups, with their values by group; `-` where one has none."""
    names = dict.fromkeys(name for group in groups for name in group.params)
    rows = {name: [group.params.get(name, "-") for group in groups] for name in sorted(names)}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _key(run: Run) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(_deciding(run).items()))


def _seeds(runs: Iterable[Run]) -> list[str]:
    return sorted({run.seed for run in runs}, key=lambda seed: (len(seed), seed))


def _failed(runs: Sequence[Run]) -> tuple[str, ...]:
    """Seeds of which no run is more than failed; who was told to stop says nothing."""
    others = {run.seed for run in runs if run.status not in BROKEN}
    return tuple(seed for seed in _seeds(run for run in runs if run.status == "FAILED") if seed not in others)


def _deciding(run: Run) -> dict[str, str]:
    """The parameters that decide results or speed, and where the run ran; what is null, older runs may not have."""
    params = {name: value for name, value in run.params.items() if value != "None" and not _NOT_COMPUTED.match(name)}
    return params | {name: run.tags[name] for name in ("world_size", "device") if name in run.tags}


def _labels(params: Sequence[Mapping[str, str]]) -> list[str]:
    """As few of the differing parameters as tell the groups apart, the method first; numbers where those do not do."""
    names = {name for own in params for name in own}
    differing = [n for n in sorted(names, key=_importance) if len({own.get(n) for own in params}) > 1]
    chosen: list[str] = []
    for name in differing[:1] + sorted(
        differing[1:], key=lambda n: (-_distinct(params, [*differing[:1], n]), _importance(n))
    ):
        if len(chosen) == _MOST_IN_LABEL:
            break
        if not chosen or _distinct(params, [*chosen, name]) > _distinct(params, chosen):
            chosen.append(name)
    labels = [_label(own, chosen) for own in params]
    count = Counter(labels)
    return [f"{label} #{place}" if count[label] > 1 else label for place, label in enumerate(labels, start=1)]


def _importance(name: str) -> tuple[int, str]:
    return (_LABEL_FIRST.index(name) if name in _LABEL_FIRST else len(_LABEL_FIRST), name)


def _distinct(params: Iterable[Mapping[str, str]], names: Sequence[str]) -> int:
    return len({tuple(own.get(name) for name in names) for own in params})


def _label(params: Mapping[str, str], chosen: Sequence[str]) -> str:
    parts = [
        params[name] if name.endswith(".name") else f"{name.rsplit('.', 1)[-1]} {params[name]}"
        for name in chosen
        if name in params
    ]
    return ", ".join(parts) or params.get("optimizer.name", "all runs")


def last_value(series: Series | None) -> float | None:
    """That of the last step; None if there is none."""
    return series[max(series)] if series else None


def _split(run: Run) -> dict[str, float]:
    """Seconds per step by phase, mean over the ranks; what is logged as `<what>/seconds` is spread over the steps."""
    phases: dict[str, list[float]] = {}
    for name, series in run.metrics.items():
        if found := _PHASE.match(name):
            phases.setdefault(found[1], []).append(float(np.mean(list(series.values()))))
    split = {name: float(np.mean(values)) for name, values in phases.items()}
    last = max((max(series) for name, series in run.metrics.items() if name.startswith("train/") and series), default=0)
    if split and last:
        aside = {name: sum(s.values()) for name, s in run.metrics.items() if name.endswith("/seconds")}
        split["evaluation"] = sum(value for name, value in aside.items() if not name.startswith("train/")) / last
    return split
