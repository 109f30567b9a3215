"""ZO-SGD that looks before it steps."""

import math
from collections.abc import Sequence
from dataclasses import replace

from zoscale.estimators import Candidate, GradientEstimate
from zoscale.noise.segments import Segment
from zoscale.optim.zo_sgd import ZOSGD
from zoscale.probes import Direction, Piece
from zoscale.shards import TensorSpec


class Step(Direction):
    """lr g: what ZO-SGD would subtract.

    Args:
        estimate: g.
        lrs: by tensor id.
    """

    def __init__(self, estimate: GradientEstimate, lrs: dict[int, float]) -> None:
        self.estimate = estimate
        self.lrs = lrs

    def segments(self, group: Sequence[Piece]) -> list[Segment | None]:
        found = zip(group, self.estimate.mean(group), strict=True)
        return [Segment(gradient * self.lrs[piece.shard.spec.id]) for piece, gradient in found]

    def touches(self, spec: TensorSpec) -> bool:
        return self.estimate.touches(spec)


class ZOSGDConservative(ZOSGD):
    """The best of x, x - lr g and x + lr g on the batch; then weight decay (ZO-SGD-Cons, arXiv 2402.11592).

    Three forwards more than ZO-SGD. The projected gradients as used are 0, 1 or -1 times those of the estimate; a trial
    that is not finite skips the step.

    Args:
        weight_decay: decoupled weight decay >= 0; not of vectors, and not part of the trials.
    """

    num_trials = 3

    def trials(self, estimate: GradientEstimate) -> list[Candidate]:
        lrs = {self._shards[id(param)].spec.id: group["lr"] for group in self.param_groups for param in group["params"]}
        step = Step(estimate, lrs)
        return [Candidate(None), Candidate(step, -1.0), Candidate(step, 1.0)]

    def decide(self, estimate: GradientEstimate, losses: Sequence[float]) -> GradientEstimate:
        finite = all(map(math.isfinite, losses))
        sign = (0.0, 1.0, -1.0)[min(range(3), key=lambda i: losses[i])] if finite else math.nan
        return replace(estimate, projected_grads=tuple(sign * rho for rho in estimate.projected_grads))
