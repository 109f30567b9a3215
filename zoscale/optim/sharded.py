"""`ShardedOptimizer`: a torch optimizer on this rank's slices of the trained tensors, in groups by name."""

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor

from zoscale.estimators import Candidate, Estimator, GradientEstimate
from zoscale.mesh import Mesh
from zoscale.probes import Probe
from zoscale.shards import ShardedParam, TensorSpec

_ANY = TensorSpec(0, "", (1, 1))
_GROUP_KEYS: dict[str, Any] = {"pattern": "", "max_ndim": 1, "lr_scale": 1.0}
"""With examples of their types."""
_SCALES = re.compile(r"(^|\.)ia3_l(\.|$)")  # IA3's, as PEFT names them


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


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers, zero-order and first-order: which tensors take which options, and whose state is whose.

    The torch contract holds: `param_groups` (with `lr`), stock schedulers, `state_dict`. The parameters are the local
    truth slices, so state is sharded with them. Subclasses implement `step` and `check_company`.

    Groups are chosen by name, first match wins, each tensor lands in exactly one: `groups` is a list of mappings with
    any of `pattern` (regular expression searched in the name), `max_ndim` (tensors of at most so many dimensions),
    `lr_scale` (factor of lr) and the options of the update rule to override. What matches none takes the defaults.
    Vectors (see `is_vector`) are not decayed, unless a group of theirs has a `weight_decay`.

    Args:
        shards: this rank's slices of all trainable tensors.
        mesh: the ranks that hold the other slices (None = this process alone).
        options: of the rule itself, `lr` among them; a subclass has them as keyword-only arguments.
        lr: learning rate >= 0.
        weight_decay: decoupled weight decay >= 0; not of vectors (biases, norms, IA3's scales).
        groups: mappings of `pattern` (regular expression searched in the name), `max_ndim`, `lr_scale` and options of
            the rule; of each tensor the first that fits counts.
    """

    goes_with: ClassVar[Company]
    """What is taken where nothing else is chosen."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What of it cannot be chosen otherwise: `probe`, `estimator`."""
    is_elementwise: ClassVar[bool] = True
    """Whether the update needs no matrix product: it has the same bits at any sharding then."""
    can_replay: ClassVar[bool] = True
    """Whether the journal's scalars are enough to take a step again."""
    num_trials: ClassVar[int] = 0
    """Points that `trials` gives."""

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
    def step(self, estimate: GradientEstimate) -> None:  # type: ignore[override]
        """Update every shard and make the next forward see it."""

    @classmethod
    @abstractmethod
    def check_company(cls, probe: Probe, estimator: Estimator) -> None:
        """Refuse a probe or an estimator that the rule cannot work with.

        Raises:
            ValueError: what was expected.
        """

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse impossible options of a group.

        Raises:
            ValueError: what was expected.
        """
        lr, weight_decay = options["lr"], options["weight_decay"]
        if not (0 <= lr < math.inf and 0 <= weight_decay < math.inf):
            raise ValueError(f"expected lr >= 0 and weight_decay >= 0, both finite, got {lr} and {weight_decay}")

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
        return "vector" if is_vector(spec) else "matrix"

    def rule_options(self, rule: str) -> dict[str, Any]:
        """Group options that a rule implies, as `lr_scale`."""
        return {"weight_decay": 0.0} if rule == "vector" else {}

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

    def _split(
        self, shards: Sequence[ShardedParam], defaults: dict[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        for group in groups:
            _check_types(group, _GROUP_KEYS | defaults)
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


def is_vector(spec: TensorSpec) -> bool:
    """Whether no rule decays or orthogonalises a tensor: biases, norms, and the scales that IA3 multiplies with.

    PEFT stores those scales as [n, 1] or [1, n]: it is their name that tells them from LoRA's matrices of rank 1, which
    are matrices as those of any rank are.
    """
    return not spec.is_matrix or _SCALES.search(spec.name) is not None


def _check_types(group: Mapping[str, Any], examples: Mapping[str, Any]) -> None:
    """Refuse keys that no example has, and text for a number or the other way round."""
    for key, value in group.items():
        if key not in examples:
            raise ValueError(f"expected the keys {', '.join(examples)} in optimizer.groups, got {key!r}")
        is_text = isinstance(examples[key], str)
        if isinstance(value, bool) or not isinstance(value, str if is_text else int | float):
            raise ValueError(
                f"expected {'text' if is_text else 'a number'} for {key} in optimizer.groups, got {value!r}"
            )
        if key == "max_ndim" and (not isinstance(value, int) or value < 0):
            raise ValueError(f"expected a whole max_ndim >= 0 in optimizer.groups, got {value!r}")


def _matches(group: Mapping[str, Any], spec: TensorSpec) -> bool:
    try:
        found = re.search(group.get("pattern", ""), spec.name) is not None
    except re.error as error:
        raise ValueError(
            f"expected a regular expression in optimizer.groups, got {group['pattern']!r}: {error}"
        ) from error
    return found and len(spec.shape) <= group.get("max_ndim", len(spec.shape))
