"""JAGUAR against full differences and SPSA: error by oracle calls (the comparison of arXiv 2409.10442).

python launch/blackbox.py [--out DIR] [--dimension D] [--calls N] [--seeds S] [--tuning-seeds S] [--settings NAME ...]

Writes comparison.json, comparison.md and comparison.png to DIR after each setting. Settings that are finished there are
kept and not run again; all settings of a DIR have the same options. Every method but those with published step sizes
picks its own from one grid, by the median of its final errors on seeds that are not counted.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoscale import blackbox, provenance
from zoscale.blackbox import ConvexSet, Simplex
from zoscale.cli import guarded
from zoscale.config import ConfigError, at_least
from zoscale.run_directory import write_json, write_text

FIRST_TUNING_SEED = 1000
CURVE_POINTS = 40
EXPONENTS = (0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0)  # Frank-Wolfe: gamma = 4 / (k + 8 d^a), eta = 4 / (k + 8 d^a)^(2/3)
FACTORS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # gradient descent: gamma = factor / L
NUM_EXAMPLES, BATCH = 400, 20


@dataclass(frozen=True)
class Problem:
    """A finite sum f(x) = mean of f(x, i) over the examples i, with the constant L of its gradient."""

    value: Callable[[Tensor], Tensor]
    sampled: Callable[[Tensor, Tensor], Tensor]
    smoothness: float


def quadratic(d: int) -> Problem:
    """Least squares on rows with a spectrum from 1 to 1/10; the solution lies outside of the sets."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -1, d, dtype=torch.float64)
    rows = torch.randn(NUM_EXAMPLES, d, generator=generator).double() * spectrum
    target = rows @ (torch.randn(d, generator=generator).double() / d**0.5)
    target += 0.1 * torch.randn(NUM_EXAMPLES, generator=generator).double()
    gram, linear, constant = rows.T @ rows / NUM_EXAMPLES, rows.T @ target / NUM_EXAMPLES, (target @ target) / 2
    constant = constant / NUM_EXAMPLES

    def value(x: Tensor) -> Tensor:
        return 0.5 * (x @ gram @ x) - linear @ x + constant

    def sampled(x: Tensor, xi: Tensor) -> Tensor:
        return 0.5 * (rows[xi] @ x - target[xi]).square().mean()

    return Problem(value, sampled, float(torch.linalg.eigvalsh(gram).max()))


def logistic(d: int) -> Problem:
    """Logistic regression on two noisy halves."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(NUM_EXAMPLES, d, generator=generator).double()
    truth = torch.randn(d, generator=generator).double()
    signs = (rows @ truth / d**0.5 + 0.3 * torch.randn(NUM_EXAMPLES, generator=generator).double()).sign()
    signed = rows * signs[:, None]

    def value(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(signed @ x)).mean()

    def sampled(x: Tensor, xi: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(signed[xi] @ x)).mean()

    return Problem(value, sampled, float(torch.linalg.matrix_norm(rows, 2) ** 2 / (4 * NUM_EXAMPLES)))


@dataclass(frozen=True)
class Setting:
    """One panel: a problem on a set, a method, and what the oracle is like."""

    problem: Callable[[int], Problem]
    feasible: ConvexSet
    frank_wolfe: bool = True
    feedback: blackbox.oracle.Feedback | None = None  # None = deterministic
    noise: float = 0.0
    tau: float = 1e-4


SETTINGS = {
    "quadratic, simplex, FW": Setting(quadratic, Simplex()),
    "logistic, l1 ball, FW": Setting(logistic, blackbox.L1Ball(3.0)),
    "quadratic, l2 ball, projected GD": Setting(quadratic, blackbox.L2Ball(0.5), frank_wolfe=False),
    "logistic, simplex, FW, two-point": Setting(logistic, Simplex(3.0), feedback="two_point", noise=1e-5, tau=1e-2),
    "logistic, l2 ball, FW, two-point": Setting(logistic, blackbox.L2Ball(2.0), feedback="two_point", tau=1e-2),
    "quadratic, simplex, FW, one-point": Setting(quadratic, Simplex(), feedback="one_point", tau=0.1),
}

METHODS = ("JAGUAR, published steps", "JAGUAR", "full differences", "SPSA")
BASELINES = {"full differences": blackbox.FullDifferences, "SPSA": blackbox.SPSA}


def estimator(
    method: str, setting: Setting, seed: int, weight: Callable[[int], float] | None
) -> blackbox.GradientEstimator:
    """What a method estimates gradients with; Frank-Wolfe averages those that have variance."""
    jaguar = blackbox.JaguarS if setting.feedback else blackbox.JaguarD
    made = BASELINES.get(method, jaguar)(tau=setting.tau, seed=seed)
    varies = setting.feedback is not None or method == "SPSA"
    return blackbox.Averaged(made, weight=weight) if varies and setting.frank_wolfe else made


def choices(method: str, setting: Setting) -> list[float | None]:
    """The grid of a method: exponents of Frank-Wolfe, factors of descent; None = published."""
    if "published" in method:
        return [None] if setting.frank_wolfe else []
    return list(EXPONENTS if setting.frank_wolfe else FACTORS)


def run(
    setting: Setting, method: str, choice: float | None, problem: Problem, start: Tensor, seed: int, calls: int
) -> list[tuple[int, float]]:
    """(oracle calls, f) along a run, at about equal distances."""
    offset, weight, step_size = 8 * start.numel() ** (choice or 0.0), None, None
    if setting.frank_wolfe and choice is not None:
        step_size = lambda k: min(1.0, 4 / (k + offset))  # noqa: E731
        weight = lambda k: min(1.0, 4 / (k + offset) ** (2 / 3))  # noqa: E731
    if setting.frank_wolfe:
        update: blackbox.Update = blackbox.FrankWolfe(setting.feasible, step_size)
    else:
        update = blackbox.GradientDescent((choice or 0.0) / problem.smoothness, setting.feasible)
    if setting.feedback is None:
        oracle = blackbox.Oracle(problem.value, noise=setting.noise, seed=seed)
    else:
        samples = blackbox.Minibatches(NUM_EXAMPLES, BATCH, seed=seed)
        oracle = blackbox.Oracle(
            problem.sampled, samples=samples, feedback=setting.feedback, noise=setting.noise, seed=seed
        )
    made, curve, due = estimator(method, setting, seed, weight), [], 0.0
    each = made.calls_per_step(start.numel())
    for point in blackbox.iterate(oracle, start, made, update):
        is_last = point.num_calls + each > calls
        if point.num_calls >= due or is_last:
            curve.append((point.num_calls, float(problem.value(point.x))))
            due += calls / CURVE_POINTS
        if is_last:
            return curve
    raise AssertionError("iterate does not end by itself")


def minimizer(problem: Problem, feasible: ConvexSet, start: Tensor) -> Tensor:
    """The best point of the set, by accelerated projected gradients with restarts and exact gradients."""
    x, y, age = start, start, 0
    for _ in range(4000):
        leaf = y.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(problem.value(leaf), leaf)
        moved = feasible.project(y - gradient / problem.smoothness)
        if float((moved - y).abs().max()) < 1e-12:
            break
        age = 0 if float(gradient @ (moved - x)) > 0 else age + 1
        x, y = moved, moved + age / (age + 3) * (moved - x)
    return moved


@dataclass(frozen=True)
class Outcome:
    """A method in a setting. Errors are (f - f*) / (f(start) - f*); one curve per seed."""

    setting: str
    method: str
    choice: float | None
    tuning: dict[str, float]
    final_errors: list[float]
    curves: list[list[tuple[int, float]]]

    @property
    def median(self) -> float:
        return statistics.median(self.final_errors)


def compare(name: str, dimension: int, calls: int, seeds: int, tuning_seeds: int) -> list[Outcome]:
    """All methods in a setting."""
    setting = SETTINGS[name]
    problem, start = setting.problem(dimension), torch.zeros(dimension, dtype=torch.float64)
    if isinstance(setting.feasible, Simplex):
        start[0] = setting.feasible.radius
    best = float(problem.value(minimizer(problem, setting.feasible, start)))
    first = float(problem.value(start)) - best

    def errors(method: str, choice: float | None, seed: int) -> list[tuple[int, float]]:
        curve = run(setting, method, choice, problem, start, seed, calls)
        return [(asked, (value - best) / first) for asked, value in curve]

    outcomes = []
    for method in METHODS:
        grid = choices(method, setting)
        if not grid:
            continue
        tuning = {}
        if len(grid) > 1:
            aside = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds)
            tuning = {str(c): statistics.median(errors(method, c, seed)[-1][1] for seed in aside) for c in grid}
        chosen = min(grid, key=lambda c: tuning.get(str(c), 0.0))
        curves = [errors(method, chosen, seed) for seed in range(seeds)]
        outcomes.append(Outcome(name, method, chosen, tuning, [c[-1][1] for c in curves], curves))
    return outcomes


def table(outcomes: list[Outcome], calls: int) -> str:
    """Markdown: the final errors."""
    lines = [
        f"| setting | method | step | error after {calls} calls: median (least to largest over seeds) |",
        "|---|---|---|---|",
    ]
    for o in outcomes:
        step = "published" if o.choice is None else f"a = {o.choice:g}" if "FW" in o.setting else f"{o.choice:g} / L"
        spread = f"{o.median:.2e} ({min(o.final_errors):.1e} to {max(o.final_errors):.1e})"
        lines.append(f"| {o.setting} | {o.method} | {step} | {spread} |")
    return "\n".join(lines) + "\n"


def plot(outcomes: list[Outcome], file: Path) -> None:
    """Medians over the seeds, one panel per setting."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(o.setting for o in outcomes))
    figure = Figure(figsize=(4 * min(4, len(names)), 3.4 * -(-len(names) // 4)), layout="constrained")
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(-(-len(names) // 4), min(4, len(names)), number, title=name)
        for index, method in enumerate(METHODS):
            for o in (o for o in outcomes if (o.setting, o.method) == (name, method)):
                asked = [calls for calls, _ in o.curves[0]]
                middle = [statistics.median(c[i][1] for c in o.curves) for i in range(len(asked))]
                axes.plot(asked, [max(m, 1e-12) for m in middle], color=f"C{index}", label=method)
        axes.set(yscale="log", xlabel="oracle calls", ylabel="(f - f*) / (f(start) - f*)")
        axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=110)


def kept(file: Path, options: dict[str, int]) -> tuple[dict[str, Any], list[Outcome]]:
    """What is finished: facts by setting, and the outcomes.

    Raises:
        ConfigError: if it was run with other options, or is damaged.
    """
    if not file.exists():
        return {}, []
    try:
        there = json.loads(file.read_text())
        outcomes = [Outcome(**row) for row in there["outcomes"]]
        runs = dict(there["runs"])
        wrong = {name: value for name, value in options.items() if there[name] != value}
    except (OSError, ValueError, KeyError, TypeError) as error:  # damaged, or of an older version
        raise ConfigError(f"results in {file}", repr(error), "choose another --out") from error
    for name, value in wrong.items():
        flag = f"--{name.replace('_', '-')}"
        raise ConfigError(f"{flag} {there[name]} as in {file}", str(value), "choose another --out")
    return runs, outcomes


def write(out: Path, options: dict[str, int], runs: dict[str, Any], outcomes: list[Outcome]) -> None:
    """All that is finished as JSON, Markdown and a picture."""
    write_json(out / "comparison.json", {**options, "runs": runs, "outcomes": [asdict(o) for o in outcomes]})
    write_text(out / "comparison.md", table(outcomes, options["calls"]))
    plot(outcomes, out / "comparison.png")


def read_command_line() -> tuple[Path, list[str], dict[str, int]]:
    """The folder of the results, the settings, and the options of all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/blackbox"), help="folder of the results")
    parser.add_argument("--dimension", type=at_least(2), default=100, help="d")
    parser.add_argument("--calls", type=int, default=10_000, help="oracle calls of a run; more than 4 d")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="runs per method")
    parser.add_argument(
        "--tuning-seeds", type=at_least(1), default=5, help="runs that choose each step size, not counted"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    options = vars(parser.parse_args())
    out, settings = options.pop("out"), options.pop("settings")
    if options["calls"] < 4 * options["dimension"] + 2:
        parser.error("expected --calls >= 4 * dimension + 2")
    return out, settings, options


def main() -> None:
    out, settings, options = read_command_line()
    torch.set_num_threads(1)
    runs, outcomes = kept(out / "comparison.json", options)
    out.mkdir(parents=True, exist_ok=True)
    for name in settings:
        if name not in runs:
            started = time.perf_counter()
            outcomes += compare(name, **options)
            seconds = time.perf_counter() - started
            runs[name] = {"commit": provenance.commit(), "torch": torch.__version__, "seconds": seconds}
        print(table([o for o in outcomes if o.setting == name], options["calls"]), flush=True)
        write(out, options, runs, outcomes)
    print(f"{sum(run['seconds'] for run in runs.values()):.0f} s; {out}/comparison.{{json,md,png}}")


if __name__ == "__main__":
    sys.exit(guarded("launch/blackbox.py", main, sys.argv[1:]))
