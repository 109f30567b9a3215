"""Gradient estimates from values: JAGUAR with its memory, and the usual ones to compare it with.

D_i f = (f(x + tau e_i) - f(x - tau e_i)) / (2 tau) is the difference along coordinate i, h the memory, d the dimension.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from zoscale.blackbox.draws import Draws, coordinates, normals, signs
from zoscale.blackbox.oracle import Oracle
from zoscale.noise.generator import Noise

Start = Literal["zero", "differences"]


class GradientEstimator(ABC):
    """Estimates the gradient at successive points; `start` begins a new run.

    Args:
        tau: smoothing radius > 0, in units of x.
        seed: of the directions; direction k is a function of (seed, k).
    """

    def __init__(self, *, tau: float = 1e-4, seed: int = 0) -> None:
        if not 0 < tau < math.inf:
            raise ValueError(f"expected a finite tau > 0, got {tau}; 1e-4 suits float64 values without noise")
        self.tau = tau
        self.noise = Noise(seed)

    def start(self, oracle: Oracle, x: Tensor) -> Tensor | None:
        """Begin a run at x [d], forgetting any other. Returns what is known of the gradient there, if anything is."""
        self.dimension = x.numel()
        return None

    @abstractmethod
    def estimate(self, oracle: Oracle, x: Tensor, step: int) -> Tensor:
        """The estimate at x in step 0, 1, ...: [d]."""

    def calls_at_start(self, dimension: int) -> int:
        """Oracle calls of `start`."""
        return 0

    def calls_per_step(self, dimension: int) -> int:
        """Oracle calls of one estimate."""
        return 2

    def frank_wolfe_step(self, step: int) -> float:
        """The step size of Frank-Wolfe that goes with the estimate: 2 / (k + 2), the classical one for gradients."""
        return 2 / (step + 2)

    def _slope(self, oracle: Oracle, x: Tensor, z: Tensor) -> float:
        """(f(x + tau z) - f(x - tau z)) / (2 tau)."""
        plus, minus = oracle.values([x + self.tau * z, x - self.tau * z])
        return (plus - minus) / (2 * self.tau)


class FullDifferences(GradientEstimator):
    """All d coordinates: sum_i D_i f e_i, with 2 d calls.

    Args:
        tau: smoothing radius > 0, in units of x.
        seed: not used; nothing is random.
    """

    def estimate(self, oracle: Oracle, x: Tensor, step: int) -> Tensor:
        return _differences(oracle, x, self.tau)

    def calls_per_step(self, dimension: int) -> int:
        return 2 * dimension


class SPSA(GradientEstimator):
    """Random signs (Spall 1992): z (f(x + tau z) - f(x - tau z)) / (2 tau), unbiased as tau -> 0.

    Args:
        tau: smoothing radius > 0, in units of x.
        seed: of the directions.
    """

    def start(self, oracle: Oracle, x: Tensor) -> None:
        super().start(oracle, x)
        self._signs = signs(self.noise, self.dimension)

    def estimate(self, oracle: Oracle, x: Tensor, step: int) -> Tensor:
        z = self._signs[step].to(x)
        return z * self._slope(oracle, x, z)


class SphereSmoothing(GradientEstimator):
    """l2 smoothing: d z (f(x + tau z) - f(x - tau z)) / (2 tau), z uniform on the unit sphere.

    Args:
        tau: smoothing radius > 0, in units of x.
        seed: of the directions.
    """

    def start(self, oracle: Oracle, x: Tensor) -> None:
        super().start(oracle, x)
        self._normals = normals(self.noise, self.dimension)

    def estimate(self, oracle: Oracle, x: Tensor, step: int) -> Tensor:
        z = torch.nn.functional.normalize(self._normals[step].to(x), dim=0)
        return z * (self.dimension * self._slope(oracle, x, z))


class _Jaguar(GradientEstimator):
    """The memory h, and one random coordinate i per step, at two calls.

    Args:
        tau: smoothing radius > 0, in units of x.
        seed: of the coordinates.
        initial: h_0 = 0 (`zero`), or the full differences at the first point (`differences`, 2 d calls).
    """

    def __init__(self, *, tau: float = 1e-4, seed: int = 0, initial: Start = "differences") -> None:
        super().__init__(tau=tau, seed=seed)
        if initial not in get_args(Start):
            raise ValueError(f"expected initial {' or '.join(get_args(Start))}, got {initial!r}")
        self.initial = initial
        self._coordinates: Draws[int]

    def start(self, oracle: Oracle, x: Tensor) -> Tensor:
        super().start(oracle, x)
        self._coordinates = coordinates(self.noise, self.dimension)
        full = self.initial == "differences"
        self.h = _differences(oracle, x, self.tau) if full else torch.zeros_like(x)
        return self.h.clone()

    def calls_at_start(self, dimension: int) -> int:
        return 2 * dimension if self.initial == "differences" else 0

    def _difference(self, oracle: Oracle, x: Tensor, step: int) -> tuple[int, float]:
        """The coordinate i of a step, and D_i f."""
        i = self._coordinates[step]
        unit = torch.zeros_like(x)
        unit[i] = 1
        return i, self._slope(oracle, x, unit)


class JaguarD(_Jaguar):
    """JAGUAR for deterministic f: h_i <- D_i f, every other coordinate keeps its last difference. The estimate is h.

    Args:
        tau: smoothing radius > 0, in units of x.
        seed: of the coordinates.
        initial: h_0 = 0 (`zero`), or the full differences at the first point (`differences`, 2 d calls).
    """

    def estimate(self, oracle: Oracle, x: Tensor, step: int) -> Tensor:
        i, difference = self._difference(oracle, x, step)
        self.h[i] = difference
        return self.h.clone()

    def frank_wolfe_step(self, step: int) -> float:
        """4 / (k + 8 d)."""
        return 4 / (step + 8 * self.dimension)


class JaguarS(_Jaguar):
    """JAGUAR for stochastic f: rho = h - d h_i e_i + d D_i f e_i with the h before the step; then h_i <- D_i f.

    rho is unbiased over i for the vector of all differences, whatever h is; h serves as control variate. Its variance
    does not vanish: use it through `Averaged`, as the method does.

    Args:
        tau: smoothing radius > 0, in units of x.
        seed: of the coordinates.
        initial: h_0 = 0 (`zero`), or the full differences at the first point (`differences`, 2 d calls).
    """

    def estimate(self, oracle: Oracle, x: Tensor, step: int) -> Tensor:
        i, difference = self._difference(oracle, x, step)
        rho = self.h.clone()
        rho[i] += self.dimension * (difference - float(self.h[i]))
        self.h[i] = difference
        return rho

    def frank_wolfe_step(self, step: int) -> float:
        """4 / (k + 8 d^(3/2))."""
        return 4 / (step + 8 * self.dimension * math.sqrt(self.dimension))


class Averaged(GradientEstimator):
    """Momentum over any estimator: g <- (1 - eta_k) g + eta_k estimate.

    g starts as what the estimator knows at the start (JAGUAR's h_0), else as its first estimate.

    Args:
        estimator: what is averaged.
        weight: eta_k by step, in (0, 1], or one for all; None = 4 / (k + 8 d^(3/2))^(2/3), published for JaguarS.
    """

    def __init__(self, estimator: GradientEstimator, *, weight: float | Callable[[int], float] | None = None) -> None:
        super().__init__(tau=estimator.tau, seed=estimator.noise.seed)
        self.estimator = estimator
        self._weight = weight
        self.g: Tensor | None

    def start(self, oracle: Oracle, x: Tensor) -> Tensor | None:
        super().start(oracle, x)
        self.g = self.estimator.start(oracle, x)
        return None if self.g is None else self.g.clone()

    def estimate(self, oracle: Oracle, x: Tensor, step: int) -> Tensor:
        fresh = self.estimator.estimate(oracle, x, step)
        self.g = fresh if self.g is None else self.g + self.weight(step) * (fresh - self.g)
        return self.g.clone()

    def weight(self, step: int) -> float:
        """eta_k.

        Raises:
            ValueError: if it is not in (0, 1].
        """
        if self._weight is None:
            return min(1.0, 4 / math.pow(step + 8 * self.dimension * math.sqrt(self.dimension), 2 / 3))
        weight = self._weight(step) if callable(self._weight) else self._weight
        if not 0 < weight <= 1:
            raise ValueError(f"expected weights in (0, 1], got {weight} in step {step}")
        return weight

    def calls_at_start(self, dimension: int) -> int:
        return self.estimator.calls_at_start(dimension)

    def calls_per_step(self, dimension: int) -> int:
        return self.estimator.calls_per_step(dimension)

    def frank_wolfe_step(self, step: int) -> float:
        """That of the estimator."""
        return self.estimator.frank_wolfe_step(step)


def _differences(oracle: Oracle, x: Tensor, tau: float) -> Tensor:
    """sum_i D_i f e_i: [d]. All 2 d values belong to one estimate."""

    def points() -> Iterator[Tensor]:
        for i in range(x.numel()):
            for sign in (1, -1):
                point = x.clone()
                point[i] += sign * tau
                yield point

    values = torch.tensor(oracle.values(points()), dtype=torch.float64)
    return ((values[::2] - values[1::2]) / (2 * tau)).to(x)
