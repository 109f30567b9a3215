"""`Rehearsal`: the arithmetic of a step on weights of its own, so that kernels are compiled before the first step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from zoscale.config.sections import Master
from zoscale.data.batch import MicroBatch
from zoscale.estimators import Candidate, Estimator
from zoscale.forward.compilation import CompiledAnswers
from zoscale.forward.fan_out import FanOutForward
from zoscale.forward.scratch import Draws
from zoscale.forward.sequential import Forward, perturbed
from zoscale.mesh import Mesh
from zoscale.noise.generator import Noise
from zoscale.noise.kernels import kernels_on
from zoscale.noise.segments import Write, write_all
from zoscale.noise.streams import MANY
from zoscale.objectives import Objective
from zoscale.optim import ShardedOptimizer
from zoscale.probes import Piece, Probe
from zoscale.shards import ShardedParam, shard_parameters

_SHAPES = [(1024, 1024), (8, 4096), (1024,), (127, 131), (16411,), (31, 33), (1021,)]
"""First a whole chunk: the compiler sees that threads pay. Then few rows, of which one is a large share. Even and odd
sizes, large enough to be fused and smaller."""
_SMALL = [(8, 64), (31, 33)]  # aligned and not, where kernels take tensors together
_TOGETHER = 16 * MANY  # of them, of which a probe may take a few


def rehearse_forward(
    forward: Forward,
    batches: Sequence[MicroBatch],
    candidates: Callable[[], Sequence[Candidate]],
    num_trials: int,
    objective: Objective,
) -> None:
    """Let the forward see what it need not run, and if blocks are compiled, take losses of every shape of passes.

    Args:
        forward: of the run.
        batches: one of each shape.
        candidates: gives those of a step.
        num_trials: candidates of a step's second round.
        objective: of the run.
    """
    if isinstance(forward, FanOutForward):
        forward.learn(batches)
    answers = getattr(forward, "model", None)
    if not isinstance(answers, CompiledAnswers):
        return
    points = candidates()
    with answers.compiling():
        for batch in batches:
            counts = forward.counts(batch, batches, points, num_trials) if isinstance(forward, FanOutForward) else [1]
            for count in counts:
                chosen = [points[number % len(points)] for number in range(count)]
                for _ in range(answers.runs_until_recorded):
                    forward.losses([batch], chosen, objective)


@dataclass(frozen=True)
class Rehearsal:
    """What a step does apart from the forward, without a model.

    Args:
        probe: of the run.
        estimator: of the run.
        optimizer: makes the update rule.
        master: of the weights.
    """

    probe: Probe
    estimator: Estimator
    optimizer: Callable[[Sequence[ShardedParam], Mesh], ShardedOptimizer]
    master: Master

    def run(self, noise: Noise, shards: Sequence[ShardedParam]) -> None:
        """Perturb and update zeros of the types and on the devices of `shards`; does nothing with eager noise."""
        if not noise.compiled:
            return
        for dtype, device in sorted({(s.live.dtype, s.truth.device) for s in shards if len(s)}, key=str):
            for shape in _SHAPES:  # one by one: a probe may choose among tensors
                self._step(noise, self._zeros([shape], dtype, device), device)
            for shape in _SMALL if kernels_on(device) is not None else ():
                self._step(noise, self._zeros([shape] * _TOGETHER, dtype, device), device)

    def _zeros(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[ShardedParam]:
        found = [nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape in shapes]
        return shard_parameters(nn.ParameterList(found), master=self.master)

    @torch.no_grad()
    def _step(self, noise: Noise, shards: Sequence[ShardedParam], device: torch.device) -> None:
        specs = [shard.spec for shard in shards]
        directions = [self.probe.draw(noise, specs, 0, k) for k in range(self.estimator.num_directions)]
        points = [Candidate(direction, 1.0) for direction in directions]
        for point in points:
            with perturbed(shards, point):
                pass
        draws = Draws(points, shards)
        for _ in draws.values([(shard.live, shard) for shard in shards]):
            pass
        for shard in shards:  # as a lookup draws, for several slabs at once
            edges = (0, len(shard) // 2, len(shard))
            slabs = [ShardedParam.outline(shard.spec, first, last, device) for first, last in pairwise(edges)]
            for _ in draws.scratch([(shard.live, draws.at(slabs))]):
                pass
        for point in points:  # as a pass perturbs adapters
            write_all(_writes(point, shards), point.radius)
        losses = [float(number) for number in range(self.estimator.num_candidates)]
        self.optimizer(shards, Mesh(device, ranks=(0, 1))).step(self.estimator.estimate(directions, losses))


def _writes(point: Candidate, shards: Sequence[ShardedParam]) -> list[Write]:
    group = [Piece(shard, 0, len(shard)) for shard in shards]
    drawn = point.direction.segments(group) if point.direction is not None else []
    return [
        Write(segment, torch.empty_like(shard.live), shard.truth, 0)
        for shard, segment in zip(shards, drawn, strict=True)
        if segment is not None
    ]
