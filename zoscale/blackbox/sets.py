"""Convex sets with a projection (for gradient descent) and a linear minimiser (for Frank-Wolfe)."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ConvexSet(ABC):
    """A compact convex set Q.

    Args:
        radius: size > 0.
    """

    def __init__(self, radius: float = 1.0) -> None:
        if not 0 < radius < math.inf:
            raise ValueError(f"expected a finite radius > 0, got {radius}")
        self.radius = radius

    @abstractmethod
    def excess(self, x: Tensor) -> float:
        """By how much x misses the conditions of the set; <= 0 inside."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The point of the set that is nearest to x in the Euclidean norm: [d], a new tensor."""

    @abstractmethod
    def linear_minimizer(self, g: Tensor) -> Tensor:
        """A point s of the set with the least <s, g>: [d]."""

    def contains(self, x: Tensor, *, tolerance: float | None = None) -> bool:
        """Whether x lies in the set, up to rounding.

        Args:
            x: [d].
            tolerance: of the excess, per unit of max(1, radius); None = 1e-9, or 8 roundings of a coarser type.
        """
        if tolerance is None:
            tolerance = max(1e-9, 8 * torch.finfo(torch.result_type(x, 1.0)).eps)
        return self.excess(x) <= tolerance * max(1.0, self.radius)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.radius:g})"


class Simplex(ConvexSet):
    """{x >= 0, sum of x = radius}.

    Args:
        radius: sum of the coordinates.
    """

    def excess(self, x: Tensor) -> float:
        return max(-float(x.min()), abs(float(x.sum(dtype=torch.float64)) - self.radius))

    def project(self, x: Tensor) -> Tensor:
        """By sorting (Held, Wolfe, Crowder 1974): x - threshold, cut at 0.

        The projection of x is that of x - max(x), in float64: what counts is then no larger than the radius, however
        large x is, and the first of the sorted, 0, is always above its threshold, -radius.
        """
        below = x.double() - x.max()
        largest = below.sort(descending=True).values
        counts = torch.arange(1, x.numel() + 1, dtype=below.dtype, device=x.device)
        thresholds = (largest.cumsum(0) - self.radius) / counts
        support = int((largest > thresholds).sum())
        return (below - thresholds[support - 1]).clamp(min=0).to(x.dtype)

    def linear_minimizer(self, g: Tensor) -> Tensor:
        s = torch.zeros_like(g)
        s[g.argmin()] = self.radius
        return s


class L1Ball(ConvexSet):
    """{sum of |x| <= radius}.

    Args:
        radius: of the ball.
    """

    def excess(self, x: Tensor) -> float:
        return float(x.abs().sum(dtype=torch.float64)) - self.radius

    def project(self, x: Tensor) -> Tensor:
        """Onto the simplex of absolute values (Duchi et al., ICML 2008)."""
        if self.excess(x) <= 0:
            return x.clone()
        return Simplex(self.radius).project(x.abs()) * x.sign()

    def linear_minimizer(self, g: Tensor) -> Tensor:
        s = torch.zeros_like(g)
        steepest = g.abs().argmax()
        s[steepest] = -self.radius if g[steepest] > 0 else self.radius
        return s


class L2Ball(ConvexSet):
    """{Euclidean norm of x <= radius}.

    Args:
        radius: of the ball.
    """

    def excess(self, x: Tensor) -> float:
        return float(x.norm()) - self.radius

    def project(self, x: Tensor) -> Tensor:
        return x * (self.radius / x.norm()) if self.excess(x) > 0 else x.clone()

    def linear_minimizer(self, g: Tensor) -> Tensor:
        norm = g.norm()
        return g * (-self.radius / norm) if norm > 0 else torch.zeros_like(g)
