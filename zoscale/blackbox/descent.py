"""The methods: gradient descent (projected, if there is a set) and Frank-Wolfe, and the loop that runs them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoscale.blackbox.estimators import GradientEstimator
from zoscale.blackbox.oracle import Oracle, start_point
from zoscale.blackbox.sets import ConvexSet

StepSize = float | Callable[[int], float]


class Update(ABC):
    """From a point and a gradient estimate to the next point."""

    feasible: ConvexSet | None

    @abstractmethod
    def __call__(self, x: Tensor, g: Tensor, step: int, estimator: GradientEstimator) -> Tensor:
        """The point after step 0, 1, ...: [d]; in the set if x was."""


class GradientDescent(Update):
    """x <- x - gamma_k g, projected on the set if there is one.

    Args:
        step_size: gamma_k >= 0, in units of x per unit of gradient: a number, or a function of the step.
        feasible: the set Q; None = the whole space.
    """

    def __init__(self, step_size: StepSize, feasible: ConvexSet | None = None) -> None:
        self.step_size = step_size
        self.feasible = feasible

    def __call__(self, x: Tensor, g: Tensor, step: int, estimator: GradientEstimator) -> Tensor:
        moved = x - _checked(self.step_size, step, math.inf) * g
        return moved if self.feasible is None else self.feasible.project(moved)


class FrankWolfe(Update):
    """s = argmin over Q of <s, g>; x <- x + gamma_k (s - x). Needs no projection.

    Args:
        feasible: the set Q.
        step_size: gamma_k in [0, 1]: a number, or a function of the step; None = the estimator's published one.
    """

    def __init__(self, feasible: ConvexSet, step_size: StepSize | None = None) -> None:
        self.feasible: ConvexSet = feasible
        self.step_size = step_size

    def __call__(self, x: Tensor, g: Tensor, step: int, estimator: GradientEstimator) -> Tensor:
        chosen = estimator.frank_wolfe_step if self.step_size is None else self.step_size
        gamma = _checked(chosen, step, 1)
        return (1 - gamma) * x + gamma * self.feasible.linear_minimizer(g)


@dataclass(frozen=True)
class Iterate:
    """A point of a run.

    Args:
        x: the point, [d].
        num_steps: steps taken so far.
        num_calls: oracle calls so far, those of the start (h_0) included.
    """

    x: Tensor
    num_steps: int
    num_calls: int


class NotFiniteError(FloatingPointError):
    """A value of the function is not finite.

    Args:
        message: what was met.
        last: the last point before it; the start if there was no step.
    """

    def __init__(self, message: str, last: Iterate) -> None:
        super().__init__(message, last)
        self.last = last

    def __str__(self) -> str:
        return str(self.args[0])


def iterate(oracle: Oracle, x: Any, estimator: GradientEstimator, update: Update) -> Iterator[Iterate]:
    """The points of a run without end, the first one included.

    Args:
        oracle: the function.
        x: where to start, [d]; a tensor keeps its floating type, numbers become float64.
        estimator: of gradients; it is started anew.
        update: the method.

    Raises:
        ValueError: if x is no finite vector or not in the set.
        FloatingPointError: if a value of the function is not finite.
    """
    point = start_point(x)
    if update.feasible is not None and not update.feasible.contains(point, tolerance=1e-6):
        raise ValueError(
            f"expected a start in {update.feasible}, got {point} outside by {update.feasible.excess(point):.3g}; "
            "take project(x) of the set"
        )
    before = oracle.num_calls
    estimator.start(oracle, point)
    step = 0
    while True:
        yield Iterate(point, step, oracle.num_calls - before)
        point = update(point, estimator.estimate(oracle, point, step), step, estimator)
        step += 1


def minimize(oracle: Oracle, x: Any, estimator: GradientEstimator, update: Update, *, max_calls: int) -> Iterate:
    """The last point of a run that the number of calls allows.

    Args:
        oracle, x, estimator, update: as for `iterate`.
        max_calls: oracle calls at most, those of the start included.

    Raises:
        ValueError: also if max_calls does not allow one step; nothing is called then.
        NotFiniteError: if a value of the function is not finite; its `last` is the point that was reached.
    """
    point = start_point(x)
    each = estimator.calls_per_step(point.numel())
    least = estimator.calls_at_start(point.numel()) + each
    if max_calls < least:
        raise ValueError(f"expected max_calls >= {least} for one step of {type(estimator).__name__}, got {max_calls}")
    last = Iterate(point, 0, 0)
    try:
        for last in iterate(oracle, point, estimator, update):
            if last.num_calls + each > max_calls:
                break
    except FloatingPointError as error:
        message = f"{error}; `last` of this error is the point after {last.num_steps} steps"
        raise NotFiniteError(message, last) from error
    return last


def _checked(step_size: StepSize, step: int, limit: float) -> float:
    gamma = step_size(step) if callable(step_size) else step_size
    if not 0 <= gamma <= limit or not math.isfinite(gamma):
        raise ValueError(f"expected finite step sizes in [0, {limit}], got {gamma} in step {step}")
    return gamma
