"""Estimators: which points to evaluate, and the gradient that their losses imply.

A gradient is a few scalars and seeds: `GradientEstimate` holds q directions and q projected gradients and turns them
into numbers only slice by slice, on the shard that asks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from zoscale.config import Table
from zoscale.grouping import alike
from zoscale.noise.segments import Segment, SignTerms
from zoscale.noise.sums import Sum
from zoscale.probes import Direction, Piece
from zoscale.shards import TensorSpec


@dataclass(frozen=True)
class Candidate:
    """A point x + radius * z, whose loss is asked for.

    Args:
        direction: z; None = the point x itself.
        radius: signed smoothing radius (the paper's tau); 0 with a direction asks for the derivative along it instead.
    """

    direction: Direction | None
    radius: float = 0.0

    @property
    def is_derivative(self) -> bool:
        """Whether not a loss but its derivative is asked for."""
        return self.direction is not None and self.radius == 0


@dataclass(frozen=True)
class GradientEstimate:
    """g = (1/q) sum_k rho_k z_k, kept as scalars.

    Args:
        directions: z_1 .. z_q.
        projected_grads: rho_1 .. rho_q, derivatives of the loss along the directions.
        loss: estimate of f(x): f(x) itself where it was taken, else the mean over the perturbed points.
    """

    directions: tuple[Direction, ...]
    projected_grads: tuple[float, ...]
    loss: float

    @property
    def is_finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.loss) and all(math.isfinite(rho) for rho in self.projected_grads)

    @property
    def is_compiled(self) -> bool:
        """Whether the arithmetic of the update is fused by a compiler."""
        return any(direction.is_compiled for direction in self.directions)

    def touches(self, spec: TensorSpec) -> bool:
        """Whether g may be other than zero on a tensor."""
        return any(direction.touches(spec) for direction in self.directions)

    def stream(self, piece: Piece) -> Sum | None:
        """g on a piece for kernels that make every z_k in registers; None where some must be drawn."""
        return Sum.of([direction.stream(piece) for direction in self.directions], self.projected_grads)

    def is_bits(self, piece: Piece) -> bool:
        """Whether every z_k on a piece is signs as bits, where it is not zero."""
        return all(direction.is_bits(piece) for direction in self.directions)

    def sums(self, group: Sequence[Piece]) -> tuple[list[tuple[list[Piece], Sum]], list[Piece]]:
        """g on pieces together, for kernels that make every z_k in registers; and the pieces where some are drawn."""
        found, rest = list[tuple[Piece, Sum]](), list[Piece]()
        for piece in group:
            own = self.stream(piece)
            if own is None:
                rest.append(piece)
            else:
                found.append((piece, own))
        kinds = alike(own.kind for _, own in found)
        joined = [([found[i][0] for i in kind], Sum.joined([found[i][1] for i in kind])) for kind in kinds]
        return joined, rest

    def mean(self, group: Sequence[Piece]) -> list[Tensor]:
        """g = (1/q) sum_k rho_k z_k on each piece: float32 of its size."""
        sums, rest = self.sums(group)
        found = dict(zip(rest, self.drawn_mean(rest), strict=True))
        for pieces, own in sums:
            found |= zip(pieces, own.mean(), strict=True)
        return [found[piece] for piece in group]

    def drawn_mean(self, group: Sequence[Piece]) -> list[Tensor]:
        """`mean` on pieces where some z_k is drawn."""
        totals = _zeros(group)
        for number, segment, rho in self._terms(group):
            segment.add_to(totals[number], rho)
            del segment  # before the next is drawn
        if len(self.directions) == 1 or not totals:
            return totals
        count = totals[0].new_full((), len(self.directions))  # CUDA multiplies by the reciprocal of a Python number
        return [total.div_(count) for total in totals]

    def signs(self, group: Sequence[Piece]) -> list[SignTerms | None]:
        """Every rho_k z_k on each piece; None where some are no signs as bits, or are made by kernels."""
        wanted = [p for p in group if self.is_bits(p) and all(z.stream(p) is None for z in self.directions)]
        drawn = [direction.segments(wanted) for direction in self.directions] if wanted else []
        found = {
            piece: SignTerms.of(segments, self.projected_grads, piece.stop - piece.start, piece.shard.truth.device)
            for piece, *segments in zip(wanted, *drawn, strict=True)
        }
        return [found.get(piece) for piece in group]

    def totals(self, group: Sequence[Piece]) -> list[tuple[Tensor, Tensor]]:
        """On each piece, sum_k rho_k z_k and the number of directions that visit a coordinate (z_k not zero there).

        Their mean over the visits is what JAGUAR's memory keeps. Given that a direction visits coordinate i, E[rho z_i]
        is the partial derivative i, whatever the support and q, if the elements of z are uncorrelated and of variance 1
        on the support. Of `orthogonal` and `subspace` it is scaled by their variance, of one subspace projected;
        of signs `ones` it is the sum of the derivatives over the support.

        Returns:
            Per piece both, float32 of its size.
        """
        totals, visits = _zeros(group), _zeros(group)
        for number, segment, rho in self._terms(group):
            segment.visit(totals[number], visits[number], rho)
            del segment  # before the next is drawn
        return list(zip(totals, visits, strict=True))

    def _terms(self, group: Sequence[Piece]) -> Iterator[tuple[int, Segment, float]]:
        """(number of the piece, z_k on it, rho_k), direction by direction, where z_k is not zero."""
        for direction, rho in zip(self.directions, self.projected_grads, strict=True):
            for number, segment in enumerate(direction.segments(group) if group else ()):
                if segment is not None:
                    yield number, segment, rho
                del segment


def _zeros(group: Sequence[Piece]) -> list[Tensor]:
    return [torch.zeros(piece.stop - piece.start, device=piece.shard.truth.device) for piece in group]


class Estimator(ABC):
    """Turns losses at candidate points into a gradient estimate.

    Args:
        tau: smoothing radius > 0, in units of the weights.
        num_directions: q >= 1 directions per step.
    """

    takes_derivatives: ClassVar[bool] = False
    """Whether candidates are derivatives: only a forward on the whole model gives them."""
    num_backwards: ClassVar[int] = 0
    """Candidates that a backward pass answers for, not a forward pass."""

    def __init__(self, *, tau: float = 1e-3, num_directions: int = 1) -> None:
        if not (tau > 0 and math.isfinite(tau)):
            raise ValueError(f"expected a finite tau > 0, got {tau}; the papers use 1e-3 (full) and 1e-2 (LoRA)")
        if num_directions < 1:
            raise ValueError(f"expected num_directions >= 1, got {num_directions}")
        self.tau = tau
        self.num_directions = num_directions

    @property
    @abstractmethod
    def num_candidates(self) -> int:
        """Forward evaluations of the batch per step (K)."""

    @abstractmethod
    def candidates(self, directions: Sequence[Direction]) -> list[Candidate]:
        """The K points of a step, in the order in which `estimate` takes their losses."""

    @abstractmethod
    def estimate(self, directions: Sequence[Direction], losses: Sequence[float]) -> GradientEstimate:
        """The estimate from the K losses (float64)."""

    def loss(self, losses: Sequence[float]) -> float:
        """The estimate of f(x) from all losses of a step: those of an optimizer's trials follow the K."""
        return self.estimate((), losses[: self.num_candidates]).loss


class TwoPoint(Estimator):
    """rho_k = (f(x + tau z_k) - f(x - tau z_k)) / (2 tau): two forwards per direction.

    Args:
        tau: smoothing radius > 0, in units of the weights.
        num_directions: q >= 1 directions per step.
    """

    @property
    def num_candidates(self) -> int:
        return 2 * self.num_directions

    def candidates(self, directions: Sequence[Direction]) -> list[Candidate]:
        return [Candidate(z, sign * self.tau) for z in directions for sign in (1, -1)]

    def estimate(self, directions: Sequence[Direction], losses: Sequence[float]) -> GradientEstimate:
        pairs = zip(losses[::2], losses[1::2], strict=True)
        rhos = tuple((plus - minus) / (2 * self.tau) for plus, minus in pairs)
        return GradientEstimate(tuple(directions), rhos, sum(losses) / len(losses))


class OneSided(Estimator):
    """rho_k = (f(x + tau z_k) - f(x)) / tau: one forward per direction and one for f(x), shared.

    Args:
        tau: smoothing radius > 0, in units of the weights.
        num_directions: q >= 1 directions per step.
    """

    @property
    def num_candidates(self) -> int:
        return 1 + self.num_directions

    def candidates(self, directions: Sequence[Direction]) -> list[Candidate]:
        return [Candidate(None), *(Candidate(z, self.tau) for z in directions)]

    def estimate(self, directions: Sequence[Direction], losses: Sequence[float]) -> GradientEstimate:
        base = losses[0]
        rhos = tuple((loss - base) / self.tau for loss in losses[1:])
        return GradientEstimate(tuple(directions), rhos, base)


class NormalizedOneSided(OneSided):
    """rho_k = (f(x + tau z_k) - f(x)) / (tau sigma), sigma the standard deviation of the q losses f(x + tau z_k).

    One-sided differences normalised by the losses' spread (FZOO, arXiv 2506.09034): sigma is about tau times the norm
    of the gradient, so the step is that of normalised descent at lr / tau. Where the q losses are all equal (tau too
    small for the dtype, a loss of few values) they tell the directions apart by nothing: rho_k = 0, as equal losses
    give it with every estimator.

    Args:
        tau: smoothing radius > 0, in units of the weights.
        num_directions: q >= 2 directions per step (the paper's N).
    """

    def __init__(self, *, tau: float = 1e-3, num_directions: int = 8) -> None:
        super().__init__(tau=tau, num_directions=num_directions)
        if num_directions < 2:
            raise ValueError(f"expected num_directions >= 2, whose losses have a spread, got {num_directions}")

    def estimate(self, directions: Sequence[Direction], losses: Sequence[float]) -> GradientEstimate:
        plain = super().estimate(directions, losses)
        perturbed = losses[1:]
        mean = sum(perturbed) / self.num_directions
        sigma = math.sqrt(sum((loss - mean) * (loss - mean) for loss in perturbed) / (self.num_directions - 1))
        if max(perturbed) == min(perturbed):  # the mean's rounding is no spread
            sigma = math.inf
        return replace(plain, projected_grads=tuple(rho / sigma for rho in plain.projected_grads))


class _Exact(Estimator):
    """f(x) and its derivatives along the directions, as they are found; without tau."""

    def __init__(self, *, num_directions: int = 1) -> None:
        super().__init__(num_directions=num_directions)

    @property
    def num_candidates(self) -> int:
        return 1 + self.num_directions

    def candidates(self, directions: Sequence[Direction]) -> list[Candidate]:
        return [Candidate(None), *(Candidate(z) for z in directions)]

    def estimate(self, directions: Sequence[Direction], losses: Sequence[float]) -> GradientEstimate:
        return GradientEstimate(tuple(directions), tuple(losses[1:]), losses[0])


class ForwardGrad(_Exact):
    """rho_k = <grad f(x), z_k> by forward-mode differentiation (Baydin et al., arXiv 2202.08587): exact, without tau.

    Needs the whole model on every rank (`mesh.shard_size=1`): ZeRO-3 gathers weights without their tangents. Twice the
    memory of a forward, for the tangents of weights and activations.

    Args:
        num_directions: q >= 1 directions per step.
    """

    takes_derivatives = True


class Backpropagation(_Exact):
    """The gradient itself, by one forward and one backward pass: rho = |g| along z = g / |g|.

    For the optimizers fo_sgd and fo_adamw, whose gradients stay with DeepSpeed; the scalars are for the records.
    """

    num_backwards = 1

    def __init__(self) -> None:
        super().__init__()


ESTIMATORS: Table[Estimator] = Table(
    {
        "two_point": TwoPoint,
        "one_sided": OneSided,
        "fzoo": NormalizedOneSided,
        "forward_grad": ForwardGrad,
    },
    Estimator,
)
