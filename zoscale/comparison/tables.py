"""The tables of a comparison as rows of text: for the terminal and for the page."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from zoscale.comparison.comparison import Comparison
from zoscale.comparison.groups import AXES, Group
from zoscale.comparison.numbers import mebibytes, short, spread
from zoscale.comparison.verdict import Goal, Verdict

Row = list[str]


def verdict_table(comparison: Comparison) -> list[Row]:
    """One row per kind of cost: who is best, how sure, how good; the header first."""
    metric = comparison.goal.metric
    rows = [["per", "best", "certainty", f"{metric} there", "runner-up", "same seeds", "compared at"]]
    for verdict in comparison.verdicts:
        first, *others = verdict.standings
        duel = verdict.duel(comparison.goal)
        rows.append(
            [
                verdict.axis.unit,
                first.group.label if others and verdict.certainty not in ("tie", "unequal costs") else "-",
                verdict.certainty,
                spread(first.value),
                f"{others[0].group.label}: {spread(others[0].value)}" if others else "-",
                f"{duel.num_won} of {duel.num_shared} won" if duel else "-",
                short(verdict.budget),
            ]
        )
    return rows


def explanations(comparison: Comparison) -> Iterator[str]:
    """Why each verdict is what it is, what the same seeds say, and the cost of the same quality."""
    for verdict in comparison.verdicts:
        parts = [f"Per {verdict.axis.unit}: {verdict.explanation}", _paired(verdict, comparison.goal)]
        yield "; ".join(filter(None, [*parts, _costs(verdict, comparison.goal.metric)])) + "."


def _paired(verdict: Verdict, goal: Goal) -> str:
    """What the seeds say that two groups share, which is more than the bands do."""
    duel = verdict.duel(goal)
    if duel is None or duel.num_shared < 2:
        return ""
    first, second = (standing.group.label for standing in verdict.standings[:2])
    won = f"{first} is better than {second} on {duel.num_won} of {duel.num_shared} shared seeds"
    return f"{won} (mean difference {short(duel.margin, 3)})"


def _costs(verdict: Verdict, metric: str) -> str:
    """What each group pays for the same value."""
    paid = [(s.cost_to_target, s.group.label) for s in verdict.standings if s.cost_to_target is not None]
    if verdict.target is None or len(paid) < 2:
        return ""
    text = ", ".join(f"{label} {short(cost)}" for cost, label in sorted(paid))
    return f"{metric} {short(verdict.target)} takes, in {verdict.axis.label}: {text}"


def result_table(comparison: Comparison) -> list[Row]:
    """One row per group: what it reached and what that took; the header first."""
    name = comparison.goal.metric.split("/", 1)[-1]
    best = f"best {comparison.goal.metric}"
    header = ["group", "seeds", f"validation {name} before", "chosen", best, *(axis.label for axis in AXES)]
    rows = [[*header, "tokens/s", "peak memory of a rank", "gathered per step and rank"]]
    for group in comparison.groups:
        before, chosen = comparison.outcome(group)
        rows.append(
            [
                group.label,
                group.num_seeds,
                spread(before),
                spread(chosen),
                spread(comparison.goal.best(group)),
                *(short(total.mean) if (total := group.total(axis)) else "-" for axis in AXES),
                short(_over_ranks(group, "tokens_per_second", sum)),
                mebibytes(_over_ranks(group, "peak_memory_bytes", max)),
                mebibytes(_over_ranks(group, "gathered_bytes_per_step", max)),
            ]
        )
    return rows


def _over_ranks(group: Group, name: str, of: Callable[[Iterable[float]], float]) -> float | None:
    values = [rank[name] for rank in group.ranks if name in rank]
    return of(values) if values else None


def time_table(comparison: Comparison) -> list[Row]:
    """Milliseconds of a step by phase; the header first."""
    phases = list(dict.fromkeys(name for group in comparison.groups for name in group.seconds_per_step))
    rows = [["group", *phases, "sum"]]
    for group in comparison.groups:
        split = group.seconds_per_step
        values = [split.get(name) for name in phases]
        known = [value for value in values if value is not None]
        rows.append([group.label, *(_milliseconds(v) for v in values), _milliseconds(sum(known) if known else None)])
    return rows if phases else rows[:1]


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else short(1e3 * value, 3)


def difference_table(comparison: Comparison) -> list[Row]:
    """One row per parameter that differs; the header first."""
    rows = [["parameter", *(group.label for group in comparison.groups)]]
    return rows + [[name, *values] for name, values in comparison.differences.items()]


def run_table(comparison: Comparison) -> list[Row]:
    """One row per run; the header first."""
    rows = [["group", "run", "seed", "status", "steps", "commit", "id"]]
    for group in comparison.groups:
        for run in group.runs:
            steps = max((max(series) for series in run.metrics.values() if series), default=0)
            commit = run.tags.get("git_commit", "-")
            rows.append([group.label, run.name, run.seed, run.status, str(steps), commit, run.id])
    return rows


def align(rows: Sequence[Row]) -> Iterator[str]:
    """Lines for a terminal; what a store says is made printable."""
    safe = [[cell if cell.isprintable() else ascii(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*safe, strict=True)]
    for row in safe:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()
