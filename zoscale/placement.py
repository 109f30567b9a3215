"""Where a model lies: whole in this process or on each rank, or cut up by ZeRO-3 for forward passes only."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from zoscale.config import ConfigError
from zoscale.lanes import lane
from zoscale.mesh import Mesh
from zoscale.models.sizes import blocks_of
from zoscale.shard_groups import GroupedAccelerator, GroupSharded, cut_up, cut_up_adapters

_ALIGNMENT = 64  # bytes; torch's own on CPUs
_READ_ELSEWHERE = ("rwkv", "xlstm")
"""Model types that ask for shapes or values of weights outside of the modules that own them."""


class WholeAccelerator(Accelerator):  # type: ignore[misc]  # accelerate is untyped
    """The launched processes, each with the whole model.

    Args:
        dtype: of its weights, by name.
        options: of `Accelerator`.
    """

    def __init__(self, *, dtype: str, **options: Any) -> None:
        super().__init__(**options)
        self.dtype = dtype


def place(model: nn.Module, accelerator: Accelerator | None) -> tuple[nn.Module, Mesh]:
    """What is called for the model, and the ranks.

    Args:
        model: a Hugging Face (or PEFT) causal LM.
        accelerator: from `zoscale.start`; None = this process alone.

    Raises:
        ConfigError: for a model that ZeRO-3 cannot shard.
        ValueError: if DeepSpeed was started with an optimizer, or a whole model has weights of another type than its
            accelerator.
    """
    if accelerator is None:
        _align(model)
        return model, Mesh(next(model.parameters()).device, ranks=(0, 1))
    if isinstance(accelerator, GroupedAccelerator):
        return _shard_in_groups(model, accelerator), accelerator.mesh
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _shard(model, accelerator), Mesh(accelerator.device)
    if isinstance(accelerator, WholeAccelerator):
        check_dtype(model, accelerator.dtype)
    model.to(accelerator.device)
    _align(model)
    return model, Mesh(accelerator.device, shard_size=1)


def _align(model: nn.Module) -> None:
    """Copy weights in the memory of a CPU that lie as in the file they were read from to where torch would put them.

    Products of a single row are rounded otherwise there than with the weights that ZeRO-3 gathers.
    """
    for param in model.parameters():
        if param.device.type == "cpu" and param.is_floating_point() and param.data_ptr() % _ALIGNMENT:
            param.data = param.data.clone()


def check_dtype(model: nn.Module, wanted: str) -> None:
    """Refuse a whole model of another type: ZeRO-3 casts a model when it is built, and nothing casts one that is whole.

    Raises:
        ValueError: if its input embedding is of another type.
    """
    table = getattr(model, "get_input_embeddings", lambda: None)()
    found = "" if table is None else str(table.weight.dtype).removeprefix("torch.")
    if table is not None and table.weight.is_floating_point() and found != wanted:
        raise ValueError(
            f"expected weights of {wanted}, the dtype of the Runtime, got {found}: load the model with "
            f"dtype={wanted!r}, or start with Runtime(dtype={found!r})"
        )


def _shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Hand the model to ZeRO-3 for forward passes only: no optimizer, no gradient hooks, blocks gathered whole."""
    _check_shardable(model)
    _gather_blocks_whole(model, accelerator.device)
    cut_up_adapters(model)
    engine: Any = accelerator.prepare(model)
    zero: Any = getattr(engine, "optimizer", None)
    if type(zero).__name__ != "DeepSpeedZeRoOffload":
        raise ValueError(
            f"expected a ZeRO-3 engine without an optimizer, got {type(zero).__name__}; start with zoscale.start()"
        )
    _remove_gradient_hooks(zero)
    return engine  # type: ignore[no-any-return]


def _shard_in_groups(model: nn.Module, accelerator: GroupedAccelerator) -> nn.Module:
    """The same within every shard group."""
    _check_shardable(model)
    cut_up(model, accelerator.mesh, accelerator.deepspeed)
    _gather_blocks_whole(model, accelerator.device)
    sharded = GroupSharded(model, accelerator.deepspeed)
    _remove_gradient_hooks(sharded.optimizer)
    return sharded


def _check_shardable(model: nn.Module) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _READ_ELSEWHERE:
        got = f"{kind}, whose code reads weights where ZeRO-3 has not gathered them"
        raise ConfigError("a model that ZeRO-3 can shard", got, "set mesh.shard_size=1")


def _gather_blocks_whole(model: nn.Module, device: torch.device) -> None:
    import deepspeed

    blocks = blocks_of(model)
    if blocks:
        deepspeed.utils.set_z3_leaf_modules(model, list({type(block) for block in blocks}))
    if device.type == "cuda":
        keep_near(blocks)


def keep_near(blocks: Sequence[nn.Module]) -> None:
    """Keep the host at most a block ahead of its GPU, as `limit_all_gathers` of PyTorch's FSDP does.

    The memory of a gathered block can be used again only when the GPU is past it. A host that runs ahead gathers block
    after block into new memory, up to the whole model; ZeRO-3's own limits are of the gathers, not of the blocks. To be
    called before ZeRO-3 has hooks, for the wait precedes the gather.
    """
    before: list[torch.cuda.Event] = []

    def wait(_: nn.Module, args: object) -> None:
        if lane():  # another pass drives ZeRO-3
            return
        if before:
            before.pop().synchronize()  # the GPU is in the block before this one, whose launches are all queued
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        before.append(event)

    for block in blocks:
        block.register_forward_pre_hook(wait)


def _remove_gradient_hooks(zero: Any) -> None:
    for handle in zero.backward_hooks:
        handle.remove()
    zero.backward_hooks.clear()
