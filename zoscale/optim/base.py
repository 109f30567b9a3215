"""`ZeroOrderOptimizer`: a torch optimizer whose step takes a gradient estimate and updates this rank's shards."""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor

from zoscale.estimators import ESTIMATORS, Backpropagation, Candidate, Estimator, GradientEstimate
from zoscale.fused import chosen, descend, descend_sign, scalars
from zoscale.mesh import Mesh
from zoscale.probes import PROBES, Layers, Piece, Probe
from zoscale.probes.gradient import Gradient
from zoscale.segments import Term
from zoscale.shards import ShardedParam, TensorSpec
from zoscale.streams import Sum

_ANY = TensorSpec(0, "", (1, 1))
Write = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None], None]
_GROUP_KEYS = ("pattern", "max_ndim", "lr_scale")


class Shared(TypedDict, total=False):
    """The options of every rule, as a constructor takes them on: `**shared: Unpack[Shared]`."""

    weight_decay: float
    groups: list[dict[str, Any]] | None


class Company(NamedTuple):
    """The rows of the tables of probes and estimators that a method goes with, and options of theirs.

    Args:
        probe: name.
        estimator: name.
        options: by section (`probe`, `estimator`), options whose defaults are others with this method.
    """

    probe: str
    estimator: str
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


class ZeroOrderOptimizer(torch.optim.Optimizer):
    """Base of the update rules.

    The torch contract holds: `param_groups` (with `lr`), stock schedulers, `state_dict`. The parameters are the local
    truth slices, so state is sharded with them. Subclasses implement `update` for one group.

    Groups are chosen by name, first match wins, each tensor lands in exactly one: `groups` is a list of mappings with
    any of `pattern` (regular expression searched in the name), `max_ndim` (tensors of at most so many dimensions),
    `lr_scale` (factor of lr) and the options of the update rule to override. What matches none takes the defaults.

    Args:
        shards: this rank's slices of all trainable tensors.
        mesh: the ranks that hold the other slices (None = this process alone).
        options: of the rule itself, `lr` among them; a subclass has them as keyword-only arguments.
        lr: learning rate >= 0.
        weight_decay: decoupled weight decay >= 0.
        groups: overrides by name, see `ZeroOrderOptimizer`.
    """

    goes_with: ClassVar[Company] = Company("gaussian", "two_point")
    """What is taken where nothing else is chosen."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What of it cannot be chosen otherwise: `probe`, `estimator`."""
    is_elementwise: ClassVar[bool] = True
    """Whether the update needs no matrix product: it has the same bits at any sharding then."""
    can_replay: ClassVar[bool] = True
    """Whether the journal's scalars are enough to take a step again."""
    num_trials: ClassVar[int] = 0
    """Points that `trials` gives."""
    _current: GradientEstimate

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None,
        options: Mapping[str, Any],
        *,
        weight_decay: float = 0.0,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        self.mesh = mesh or Mesh()
        self._shards = {id(shard.truth): shard for shard in shards}
        defaults = {**options, "weight_decay": weight_decay}
        split = self._split(shards, defaults, groups or [])
        self._places = {name: place for place, group in enumerate(split) for name, _ in group["params"]}
        super().__init__(split, defaults)

    @abstractmethod
    def update(self, shards: Sequence[ShardedParam], estimate: GradientEstimate, group: dict[str, Any]) -> None:
        """Update the slices of one parameter group in place, through `descend`.

        Called for every group on every rank in the same order; local slices may be empty.
        """

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse impossible options of a group.

        Raises:
            ValueError: what was expected.
        """
        lr, weight_decay = options["lr"], options["weight_decay"]
        if not (0 <= lr < math.inf and 0 <= weight_decay < math.inf):
            raise ValueError(f"expected lr >= 0 and weight_decay >= 0, both finite, got {lr} and {weight_decay}")

    @classmethod
    def check_company(cls, probe: Probe, estimator: Estimator) -> None:
        """Refuse a probe or an estimator that the rule cannot work with.

        Raises:
            ValueError: what was expected.
        """
        name, estimator_name = cls.goes_with.probe, cls.goes_with.estimator
        if isinstance(estimator, Backpropagation) or isinstance(probe, Gradient):
            got = f"{type(probe).__name__} and {type(estimator).__name__}"
            raise ValueError(f"expected a probe that draws and an estimator of losses with {cls.__name__}, got {got}")
        if "probe" in cls.needs and not isinstance(probe.inner if isinstance(probe, Layers) else probe, PROBES[name]):
            raise ValueError(f"expected the probe {name} with {cls.__name__}, got {type(probe).__name__}")
        if "estimator" in cls.needs and not isinstance(estimator, ESTIMATORS[estimator_name]):
            got = type(estimator).__name__
            raise ValueError(f"expected the estimator {estimator_name} with {cls.__name__}, got {got}")

    def trials(self, estimate: GradientEstimate) -> list[Candidate]:
        """`num_trials` points to evaluate on the same batch before the step; their losses go to `decide`."""
        return []

    def decide(self, estimate: GradientEstimate, losses: Sequence[float]) -> GradientEstimate:
        """The estimate to step along, given the losses of the trials.

        Only its projected gradients may differ: they are what the journal keeps.
        """
        return estimate

    def rule(self, spec: TensorSpec) -> str:
        """Name of the rule for a tensor; tensors of different rules never share a group."""
        return "default"

    def rule_options(self, rule: str) -> dict[str, Any]:
        """Group options that a rule implies, as `lr_scale`."""
        return {}

    @torch.no_grad()
    def step(self, estimate: GradientEstimate) -> None:  # type: ignore[override]
        """Update every shard and make the next forward see it."""
        self._current = estimate
        for group in self.param_groups:
            shards = [self._shards[id(param)] for param in group["params"]]
            if shards:
                self.update(shards, estimate, group)
            for shard in shards:
                shard.reach_next_forward()

    def adopt(self, shards: Sequence[ShardedParam]) -> None:
        """Go on with other slices: tensors keep their groups, and slices that are still there their state.

        Args:
            shards: of tensors that were there at first, by name; their shapes may have changed.
        """
        self._shards = {id(shard.truth): shard for shard in shards}
        for place, group in enumerate(self.param_groups):
            own = [shard for shard in shards if self._places[shard.spec.name] == place]
            group["params"], group["param_names"] = [s.truth for s in own], [s.spec.name for s in own]
        for gone in [truth for truth in self.state if id(truth) not in self._shards]:
            del self.state[gone]

    def state_of(self, shard: ShardedParam) -> Mapping[str, Any]:
        """State of a shard: tensors of its local length, and numbers."""
        state: Mapping[str, Any] = self.state.get(shard.truth, {})
        return state

    def load_state_of(self, shard: ShardedParam, state: Mapping[str, Any]) -> None:
        """Replace the state of a shard."""
        self.state[shard.truth] = dict(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own dtype (torch would cast fp32 momentum to 16-bit weights' dtype)."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        for index, saved in state_dict["state"].items():
            for name, value in saved.items():
                param = params[index]
                self.state[param][name] = value.clone().to(param.device) if isinstance(value, Tensor) else value

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
        self, piece: Piece, memory: Tensor, update: Sum | Term, beta: float, group: Mapping[str, Any]
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

    def _split(
        self, shards: Sequence[ShardedParam], defaults: dict[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        allowed = (*_GROUP_KEYS, *defaults)
        for group in groups:
            unknown = [key for key in group if key not in allowed]
            if unknown:
                raise ValueError(f"expected the keys {', '.join(allowed)} in optimizer.groups, got {unknown[0]!r}")
        for options in ({}, *groups):
            self._group(defaults, options, self.rule(_ANY))
        made: dict[tuple[int, str], dict[str, Any]] = {}
        for shard in shards:
            place = next((i for i, group in enumerate(groups) if _matches(group, shard.spec)), len(groups))
            rule = self.rule(shard.spec)
            if (place, rule) not in made:
                made[place, rule] = self._group(defaults, groups[place] if place < len(groups) else {}, rule)
            made[place, rule]["params"].append((shard.spec.name, shard.truth))
        return [made[key] for key in sorted(made)]

    def _group(self, defaults: dict[str, Any], chosen: Mapping[str, Any], rule: str) -> dict[str, Any]:
        options = defaults | self.rule_options(rule) | dict(chosen)
        options["lr"] = options["lr"] * options.pop("lr_scale", 1.0)
        self.check(options)
        kept = {key: value for key, value in options.items() if key not in _GROUP_KEYS}
        return {**kept, "rule": rule, "params": []}


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


def _matches(group: Mapping[str, Any], spec: TensorSpec) -> bool:
    try:
        found = re.search(group.get("pattern", ""), spec.name) is not None
    except re.error as error:
        raise ValueError(
            f"expected a regular expression in optimizer.groups, got {group['pattern']!r}: {error}"
        ) from error
    return found and len(spec.shape) <= group.get("max_ndim", len(spec.shape))
