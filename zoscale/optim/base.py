"""`ZeroOrderOptimizer`: an optimizer whose step takes a gradient estimate and updates this rank's shards."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoscale.estimators import ESTIMATORS, Backpropagation, Estimator, GradientEstimate
from zoscale.noise.fused import chosen, descend, descend_sign, scalars
from zoscale.noise.segments import SignTerms, Term
from zoscale.noise.streams import Sum
from zoscale.optim.sharded import Company, ShardedOptimizer
from zoscale.probes import PROBES, Layers, Piece, Probe
from zoscale.probes.gradient import Gradient
from zoscale.shards import ShardedParam

Write = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None], None]


class ZeroOrderOptimizer(ShardedOptimizer):
    """Base of the update rules that take a gradient estimate: each rank regenerates it on its slices, and updates them.

    Subclasses implement `update` for one group.
    """

    goes_with = Company("gaussian", "two_point")
    _current: GradientEstimate

    @abstractmethod
    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        """Update the slices of one parameter group in place, through `descend`.

        Called for every group on every rank in the same order; local slices may be empty.
        """

    @classmethod
    def check_company(cls, probe: Probe, estimator: Estimator) -> None:
        name, estimator_name = cls.goes_with.probe, cls.goes_with.estimator
        if isinstance(estimator, Backpropagation) or isinstance(probe, Gradient):
            got = f"{type(probe).__name__} and {type(estimator).__name__}"
            raise ValueError(f"expected a probe that draws and an estimator of losses with {cls.__name__}, got {got}")
        if "probe" in cls.needs and not isinstance(probe.inner if isinstance(probe, Layers) else probe, PROBES[name]):
            raise ValueError(f"expected the probe {name} with {cls.__name__}, got {type(probe).__name__}")
        if "estimator" in cls.needs and not isinstance(estimator, ESTIMATORS[estimator_name]):
            got = type(estimator).__name__
            raise ValueError(f"expected the estimator {estimator_name} with {cls.__name__}, got {got}")

    @torch.no_grad()
    def step(self, estimate: GradientEstimate) -> None:  # type: ignore[override]
        self._current = estimate
        for group in self.param_groups:
            shards = [self._shards[id(param)] for param in group["params"]]
            if shards:
                self.update(shards, estimate, group)
            for shard in shards:
                shard.reach_next_forward()

    def descend(self, piece: Piece, update: Tensor | Sum, group: Mapping[str, Any]) -> None:
        """x <- x - lr (update + weight_decay x) on one piece, in float32; the live slice takes it in the same pass."""
        if isinstance(update, Sum):
            update.descend(*_slices(piece), *_settings(group), rounded=piece.shard.is_rounded_stochastically)
        else:
            self._write(descend, piece, update, group)

    def descend_sign(self, piece: Piece, memory: Tensor, group: Mapping[str, Any]) -> None:
        """`descend` along the sign of a memory; sign(0) = 0."""
        self._write(descend_sign, piece, memory, group)

    def remember_and_descend_sign(
        self, piece: Piece, memory: Tensor, update: Sum | Term | SignTerms, beta: float, group: Mapping[str, Any]
    ) -> None:
        """`descend_sign` along a memory that takes an update up first, in one pass."""
        slices, settings = _slices(piece), _settings(group)
        if isinstance(update, Sum):
            rounded = piece.shard.is_rounded_stochastically
            update.remember_and_descend_sign(memory, beta, *slices, *settings, rounded=rounded)
        else:
            words = self._rounding_words(piece)
            update.remember_and_descend_sign(memory, beta, *slices, words, *settings)

    def _write(self, function: Write, piece: Piece, update: Tensor, group: Mapping[str, Any]) -> None:
        lr, weight_decay = scalars(*_settings(group))
        words = self._rounding_words(piece)
        chosen(function, self._current.is_compiled)(*_slices(piece), update, lr, weight_decay, words)

    def is_packed(self, piece: Piece) -> bool:
        """Whether nothing is drawn for the elements of a piece but bits."""
        return self._current.is_bits(piece) and not piece.shard.is_rounded_stochastically

    def _rounding_words(self, piece: Piece) -> Tensor | None:
        """To round its truth with, if that is done stochastically."""
        is_rounded = piece.shard.is_rounded_stochastically
        return self._current.directions[0].rounding_words(piece) if is_rounded else None

    def buffer(self, shard: ShardedParam, name: str = "momentum") -> Tensor:
        """State of a shard, zero at first: float32 of its local length."""
        state = self.state[shard.truth]
        if name not in state:
            state[name] = torch.zeros_like(shard.truth, dtype=torch.float32)
        buffer: Tensor = state[name]
        return buffer


def moved(
    shards: Sequence[ShardedParam], estimate: GradientEstimate, group: Mapping[str, Any]
) -> Sequence[ShardedParam]:
    """Those that a step without memory writes: with weight decay all, else what a direction touches."""
    return shards if group["weight_decay"] else [shard for shard in shards if estimate.touches(shard.spec)]


def _slices(piece: Piece) -> tuple[Tensor, Tensor | None]:
    """The truth of a piece, and its live slice where that is kept apart."""
    shard, where = piece.shard, slice(piece.start, piece.stop)
    return shard.truth[where], shard.live[where] if shard.has_master else None


def _settings(group: Mapping[str, Any]) -> tuple[float, float]:
    return float(group["lr"]), float(group["weight_decay"])
