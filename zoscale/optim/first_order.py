"""First-order baselines: SGD and AdamW on the gradient, stepped by DeepSpeed ZeRO-3."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import nn

from zoscale.estimators import Backpropagation, Estimator, GradientEstimate
from zoscale.mesh import Mesh
from zoscale.optim.checks import check_beta
from zoscale.optim.sharded import Company, ShardedOptimizer, Shared
from zoscale.partitions import load_partition, partition_state
from zoscale.probes import Probe
from zoscale.probes.gradient import Gradient
from zoscale.shards import ShardedParam


class FirstOrder(Shared, total=False):
    """The options of every first-order rule, as `Shared`."""

    max_grad_norm: float | None


class FirstOrderOptimizer(ShardedOptimizer):
    """A torch optimizer that DeepSpeed ZeRO-3 steps on the gradients of a backward pass.

    Groups by name, schedules and checkpoints are those of the other rules; gradients, fp32 weights and moments are
    DeepSpeed's. A step cannot be taken again from the journal's scalars.

    Args:
        shards: this rank's slices of all trainable tensors.
        mesh: the ranks that hold the other slices.
        options: of the rule itself, `lr` among them.
        max_grad_norm: the gradient is scaled down to this norm where it is longer; null is never.
    """

    goes_with = Company("gradient", "backpropagation")
    needs = frozenset({"probe", "estimator"})
    can_replay = False

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None,
        options: Mapping[str, Any],
        *,
        max_grad_norm: float | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(shards, mesh, options, **shared)
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ValueError(f"expected a finite max_grad_norm > 0, or null, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self._engine: Any = None

    @abstractmethod
    def torch_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The rule of torch.

        Args:
            groups: some of `param_groups`, with the model's own parameters.
        """

    @classmethod
    def check_company(cls, probe: Probe, estimator: Estimator) -> None:
        for what, wanted, got in (("probe", Gradient, probe), ("estimator", Backpropagation, estimator)):
            if not isinstance(got, wanted):
                name = wanted.__name__.lower()
                raise ValueError(f"expected the {what} {name} with {cls.__name__}, got {type(got).__name__}")

    def attach(self, engine: Any) -> None:
        """Step with this DeepSpeed engine from now on; its optimizer came from `new_torch_optimizer`."""
        self._engine = engine

    def new_torch_optimizer(self, params: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer for DeepSpeed, with the groups that have tensors now.

        Args:
            params: the model's own, by name.
        """
        return self.torch_optimizer(
            [
                {key: value for key, value in group.items() if key not in ("params", "param_names")}
                | {"params": [params[name] for name in group["param_names"]]}
                for group in self._present_groups
            ]
        )

    @property
    def _present_groups(self) -> list[dict[str, Any]]:
        """Adapters that were disconnected may leave a group empty."""
        return [group for group in self.param_groups if group["params"]]

    @torch.no_grad()
    def step(self, estimate: GradientEstimate) -> None:  # type: ignore[override]
        """Let DeepSpeed step along the gradient of its last backward passes."""
        if self._engine is None:
            raise ValueError(f"expected a FirstOrderEngine for {type(self).__name__}, got a ZeroOrderEngine")
        inner = self._engine.optimizer.optimizer
        for own, group in zip(self._present_groups, inner.param_groups, strict=True):
            group["lr"] = own["lr"]
        self._engine.step()

    def state_of(self, shard: ShardedParam) -> dict[str, Any]:
        return {} if self._engine is None else partition_state(self._engine, shard)

    def load_state_of(self, shard: ShardedParam, state: Mapping[str, Any]) -> None:
        if self._engine is not None:
            load_partition(self._engine, shard, state)


class FOSGD(FirstOrderOptimizer):
    """torch.optim.SGD under DeepSpeed ZeRO-3: v <- momentum v + g + weight_decay x; x <- x - lr v.

    Dropout is off, as in the losses of the zero-order methods. One fp32 number per trainable element with momentum,
    beside DeepSpeed's fp32 weights and gradients, all sharded.

    Args:
        momentum: weight of the old v, in [0, 1).
        weight_decay: >= 0, as part of the gradient; not of vectors (biases, norms, IA3's scales).
    """

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None = None,
        *,
        lr: float = 1e-2,
        momentum: float = 0.0,
        **common: Unpack[FirstOrder],
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr, "momentum": momentum}, **common)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        check_beta(options["momentum"], "momentum")

    def torch_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups)


class FOAdamW(FirstOrderOptimizer):
    """torch.optim.AdamW under DeepSpeed ZeRO-3 (decoupled weight decay, arXiv 1711.05101).

    Dropout is off, as in the losses of the zero-order methods. Two fp32 numbers per trainable element, beside
    DeepSpeed's fp32 weights and gradients, all sharded.

    Args:
        beta1: weight of the old mean, in [0, 1).
        beta2: weight of the old mean square, in [0, 1).
        eps: > 0, added to the root.
    """

    def __init__(
        self,
        shards: Sequence[ShardedParam],
        mesh: Mesh | None = None,
        *,
        lr: float = 5e-5,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        **common: Unpack[FirstOrder],
    ) -> None:
        super().__init__(shards, mesh, {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}, **common)

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        check_beta(options["beta1"], "beta1")
        check_beta(options["beta2"], "beta2")
        if not 0 < options["eps"] < math.inf:
            raise ValueError(f"expected a finite eps > 0, got {options['eps']}")

    def load_state_of(self, shard: ShardedParam, state: Mapping[str, Any]) -> None:
        """As the other rules'. Moments without a number of steps are zeros: those of a tensor that took none yet."""
        super().load_state_of(shard, {"step": 0.0, **state} if state else state)

    def torch_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{**group, "betas": (group["beta1"], group["beta2"])} for group in groups])


FIRST_ORDER: dict[str, type[FirstOrderOptimizer]] = {"fo_sgd": FOSGD, "fo_adamw": FOAdamW}
