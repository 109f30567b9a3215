"""Whether perturbed weights of 16 bits differ: where weights are large, a small step is rounded away."""

from collections.abc import Callable

import torch
from torch import Tensor

from zoscale.config import ConfigError
from zoscale.probes import Direction, Piece
from zoscale.shards import ShardedParam
from zoscale.step import Engine

_MOST = 2**16  # elements that are looked at, of each rank's slice of a tensor
_ENOUGH = 1000  # perturbed ones, of which it is no accident if none has changed
_LEAST = 0.5  # share that changes, below which a tensor's part in the slope is mostly lost


def check_rounding(engine: Engine, log: Callable[[str], None]) -> None:
    """Tell which trained tensors hardly differ between the points of a step. A collective.

    With 8 bits a weight w is changed by tau for certain where tau is above |w| / 256: by 1e-3 no weight of 1 is. Their
    updates would be noise. Looked at: the first elements of each slice, along one direction of the first step.

    Raises:
        ConfigError: if nothing differs at all, so that nothing could be learnt.
    """
    candidates = engine.estimator.candidates(engine.directions(engine.num_steps))
    directions = [c.direction for c in candidates if c.direction is not None and not c.is_derivative]
    shards = [shard for shard in engine.shards if shard.live.element_size() == 2]
    if engine.estimator.num_backwards or not directions or not shards:
        return
    radii = [c.radius for c in candidates if c.direction is directions[0] or c.direction is None]
    ends = min(0.0, *radii), max(radii)
    counts = torch.tensor([_count(shard, directions[0], ends) for shard in shards], dtype=torch.float64)
    table = engine.mesh.gather_items(counts.view(-1, 1).to(engine.mesh.device), engine.mesh.world_size)
    perturbed, changed = table.sum(dim=1).view(-1, 2).T
    place = f"in {str(shards[0].live.dtype).removeprefix('torch.')} at estimator.tau={ends[1]:g}"
    remedy = "raise estimator.tau, or set model.dtype=float32"
    if perturbed.sum() >= _ENOUGH and not changed.any():
        got = f"none of {int(perturbed.sum()):,} {place}: all are rounded back"
        raise ConfigError("trained weights that a perturbation changes", got, remedy)
    hardly = (changed < _LEAST * perturbed).nonzero().flatten().tolist()
    if hardly:
        share = float(changed[hardly].sum() / perturbed[hardly].sum())
        log(
            f"rounding: {len(hardly)} of {len(engine.shards)} trained tensors, as {shards[hardly[0]].spec.name}, "
            f"hardly change {place} ({share:.0%} of their elements), and their updates are mostly noise; {remedy}"
        )


def _count(shard: ShardedParam, direction: Direction, ends: tuple[float, float]) -> tuple[int, int]:
    """Elements that a direction touches, and those of them that differ between two radii along it."""
    piece = Piece(shard, 0, min(len(shard), _MOST))
    segment = direction.segments([piece])[0] if len(shard) else None
    if segment is None:
        return 0, 0
    z = torch.zeros(piece.stop, device=shard.truth.device)
    z[segment.place(0)] = segment.value

    def live(radius: float) -> Tensor:
        return (shard.truth[: piece.stop].float() + radius * z).to(shard.live.dtype)

    return int((z != 0).sum()), int((live(ends[0]) != live(ends[1])).sum())
