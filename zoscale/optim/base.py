"""`ZeroOrderOptimizer`: an optimizer whose step takes a gradient estimate and updates this rank's shards."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoscale.estimators import ESTIMATORS, Backpropagation, Estimator, GradientEstimate
from zoscale.grouping import alike, filled
from zoscale.noise.fused import chosen, descend, descend_sign, scalars
from zoscale.noise.segments import SignTerms, Term
from zoscale.noise.sums import Sum
from zoscale.optim.sharded import Company, ShardedOptimizer
from zoscale.probes import PROBES, Layers, Piece, Probe
from zoscale.probes.gradient import Gradient
from zoscale.shards import ShardedParam, chunk

_SMALL = 16  # such a part of a chunk is a small piece
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

    def descend(self, piece: Piece, update: Tensor, group: Mapping[str, Any]) -> None:
        """x <- x - lr (update + weight_decay x) on one piece, in float32; the live slice takes it in the same pass."""
        self._write(descend, piece, update, group)

    def descend_all(self, batch: Sequence[Piece], updates: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        """`descend` on each piece; small ones as if they were one, of whose calls and launches a step would be made."""
        for numbers in _together(batch):
            some, own = [batch[number] for number in numbers], [updates[number] for number in numbers]
            if len(some) == 1:
                self.descend(some[0], own[0], group)
                continue
            truths, lives = _columns(some)
            truth, update = torch.cat(truths), torch.cat(own)
            live = None if lives[0] is None else torch.empty_like(truth, dtype=lives[0].dtype)
            words = [found for piece in some if (found := self._rounding_words(piece)) is not None]
            lr, weight_decay = scalars(*_settings(group))
            chosen(descend, self._current.is_compiled)(
                truth, live, update, lr, weight_decay, torch.cat(words) if words else None
            )  # fmt: skip
            sizes = [len(part) for part in truths]
            torch._foreach_copy_(truths, torch.split(truth, sizes))
            if live is not None:
                torch._foreach_copy_([part for part in lives if part is not None], torch.split(live, sizes))

    def descend_along(self, batch: Sequence[Piece], update: Sum, group: Mapping[str, Any]) -> None:
        """`descend` on the pieces of a sum."""
        update.descend(*_columns(batch), *_settings(group), rounded=_is_rounded(batch))

    def descend_sign(self, piece: Piece, memory: Tensor, group: Mapping[str, Any]) -> None:
        """`descend` along the sign of a memory; sign(0) = 0."""
        self._write(descend_sign, piece, memory, group)

    def remember_and_descend_sign(
        self, piece: Piece, memory: Tensor, update: Term | SignTerms, beta: float, group: Mapping[str, Any]
    ) -> None:
        """`descend_sign` along a memory that takes an update up first, in one pass."""
        words = self._rounding_words(piece)
        update.remember_and_descend_sign(memory, beta, *_slices(piece), words, *_settings(group))

    def remember_and_descend_sign_along(
        self, batch: Sequence[Piece], memories: Sequence[Tensor], update: Sum, beta: float, group: Mapping[str, Any]
    ) -> None:
        """`remember_and_descend_sign` on the pieces of a sum."""
        slices, settings = _columns(batch), _settings(group)
        update.remember_and_descend_sign(memories, beta, *slices, *settings, rounded=_is_rounded(batch))

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


def _together(batch: Sequence[Piece]) -> Iterator[list[int]]:
    """The numbers of all pieces; of small ones that are alike, those that fill a chunk of their device together."""
    sizes = [piece.stop - piece.start for piece in batch]
    for numbers in alike(_kind(piece) for piece in batch):
        limit = chunk(batch[numbers[0]].shard.truth.device)
        small = [number for number in numbers if sizes[number] * _SMALL <= limit]
        yield from filled(small, sizes.__getitem__, limit)
        yield from ([number] for number in numbers if sizes[number] * _SMALL > limit)


def _kind(piece: Piece) -> tuple[Any, ...]:
    shard = piece.shard
    return shard.truth.device, shard.truth.dtype, shard.live.dtype, shard.has_master, shard.is_rounded_stochastically


def _slices(piece: Piece) -> tuple[Tensor, Tensor | None]:
    """The truth of a piece, and its live slice where that is kept apart."""
    shard, where = piece.shard, slice(piece.start, piece.stop)
    return shard.truth[where], shard.live[where] if shard.has_master else None


def _columns(batch: Sequence[Piece]) -> tuple[list[Tensor], list[Tensor | None]]:
    """`_slices` of every piece."""
    found = [_slices(piece) for piece in batch]
    return [truth for truth, _ in found], [live for _, live in found]


def _is_rounded(batch: Sequence[Piece]) -> bool:
    return any(piece.shard.is_rounded_stochastically for piece in batch)


def _settings(group: Mapping[str, Any]) -> tuple[float, float]:
    return float(group["lr"]), float(group["weight_decay"])
