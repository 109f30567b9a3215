"""What DeepSpeed's ZeRO-3 optimizer keeps of this rank's slices: fp32 weights, gradients, moments."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoscale.shards import ShardedParam, shard_parameters


def shards_of_optimizer(model: nn.Module) -> list[ShardedParam]:
    """This rank's slices of all trainable tensors, sorted by id; the truth is that of DeepSpeed's ZeRO-3 optimizer."""
    from deepspeed.utils import safe_get_local_fp32_param

    shards = shard_parameters(model, master="none")
    for shard in shards:
        shard.truth = safe_get_local_fp32_param(shard.param).detach()[: len(shard)]
    return shards


def local_gradient(shard: ShardedParam) -> Tensor:
    """What DeepSpeed's ZeRO-3 optimizer has accumulated for a slice: float32 of its length."""
    from deepspeed.utils import safe_get_local_grad

    gradient: Tensor = safe_get_local_grad(shard.param)[: len(shard)]
    return gradient


def partition_state(engine: Any, shard: ShardedParam) -> dict[str, Any]:
    """State of a slice in the torch optimizer that DeepSpeed's ZeRO-3 shards: tensors of its length, and numbers."""
    state, start = _flat_state(engine, shard)
    return {
        key: float(value) if value.dim() == 0 else value[start : start + len(shard)]
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_partition(engine: Any, shard: ShardedParam, saved: Mapping[str, Any]) -> None:
    """Replace what `partition_state` gives; without anything saved, the whole state is forgotten."""
    state, start = _flat_state(engine, shard)
    if not saved:
        state.clear()
    for key, value in saved.items():
        if not isinstance(value, Tensor):
            state[key] = torch.tensor(value)
            continue
        if key not in state:
            state[key] = torch.zeros_like(_flat(engine, shard)[0])
        state[key][start : start + len(shard)] = value


def _flat_state(engine: Any, shard: ShardedParam) -> tuple[dict[str, Any], int]:
    flat, start = _flat(engine, shard)
    return engine.optimizer.optimizer.state[flat], start


def _flat(engine: Any, shard: ShardedParam) -> tuple[Tensor, int]:
    """The tensor in which DeepSpeed keeps the fp32 weights of a group of slices, and where this one begins."""
    zero = engine.optimizer
    group, start, _ = zero.grad_position[zero.get_param_id(shard.param)]
    return zero.fp32_partitioned_groups_flat[group], start
