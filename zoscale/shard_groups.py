"""ZeRO-3 within shard groups: consecutive ranks hold one copy of the model together, the next ones another copy.

Such a model is built as if there were no ZeRO: with its weights by the first rank of each group, empty by the others.
Then its parameters are cut up one at a time, so that the others never hold more than one whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from zoscale.mesh import Mesh, new_shard_group


class GroupedAccelerator(Accelerator):  # type: ignore[misc]  # accelerate is untyped
    """The launched processes, in shard groups of more than one rank and fewer than all.

    Args:
        shard_size: ranks per group.
        deepspeed: complete DeepSpeed configuration of each group.
        timeout: of collectives.
        options: of `Accelerator`.
    """

    def __init__(self, *, shard_size: int, deepspeed: Mapping[str, Any], timeout: timedelta, **options: Any) -> None:
        super().__init__(**options)
        self.shard_size = shard_size
        self.deepspeed = dict(deepspeed)
        self._timeout = timeout

    @cached_property
    def mesh(self) -> Mesh:
        """The ranks; making its process groups is a collective, the first time."""
        group = new_shard_group(self.shard_size, self._timeout)
        return Mesh(self.device, shard_size=self.shard_size, shard_group=group)


def shard_size_of(accelerator: Accelerator) -> int:
    """Ranks that hold one copy of the model together."""
    if isinstance(accelerator, GroupedAccelerator):
        return accelerator.shard_size
    return accelerator.num_processes if accelerator.distributed_type == DistributedType.DEEPSPEED else 1


class GroupSharded(nn.Module):
    """What a DeepSpeed engine is where all ranks are one group: called like the model.

    Args:
        model: with parameters cut up by `cut_up`.
        config: DeepSpeed configuration.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils.timer import NoopTimer

        super().__init__()
        zero = DeepSpeedConfig(dict(config)).zero_config
        self.module = model
        self.optimizer = DeepSpeedZeRoOffload(
            model,
            timers=NoopTimer(),
            ds_config=dict(config),
            overlap_comm=zero.overlap_comm,
            prefetch_bucket_size=zero.prefetch_bucket_size,
            max_reuse_distance=zero.max_reuse_distance,
            max_live_parameters=zero.max_live_parameters,
            param_persistence_threshold=zero.param_persistence_threshold,
            model_persistence_threshold=zero.model_persistence_threshold,
            offload_param_config=zero.offload_param,
            zero_quantized_weights=zero.zero_quantized_weights,
            zero_quantized_nontrainable_weights=zero.zero_quantized_nontrainable_weights,
            zero_module_granularity_threshold=zero.module_granularity_threshold,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's; while it runs, parameters that a module reads from another one are gathered as they are read."""
        self._look_out(True)
        try:
            return self.module(*args, **kwargs)
        finally:
            self._look_out(False)

    def _look_out(self, value: bool) -> None:
        for module in self.module.modules():
            parameters: Any = module._parameters
            if hasattr(parameters, "_in_forward"):  # a forward may have made the module (BigBird's attention)
                parameters._in_forward = value


@dataclass(frozen=True)
class _Outline:
    """A tensor of the model of a group's first rank, under all of its names."""

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


def cut_up(model: nn.Module, mesh: Mesh, config: Mapping[str, Any]) -> None:
    """Give the ranks of a shard group their shards, and all buffers, of its first rank's model. A collective.

    Args:
        model: whole on the first rank; elsewhere of the same structure, its values are not used.
        mesh: with the shard group.
        config: DeepSpeed configuration.
    """
    import deepspeed
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, which DeepSpeed makes once: a load given up has made it
    first: Any = None
    for param in _parameters(model, mesh):
        if first is None:
            holder, first = nn.ParameterList([param]), param
            deepspeed.zero.Init(module=holder, data_parallel_group=mesh.shard_group, config_dict_or_path=dict(config))
        else:
            _convert_like(first, param)
    _spread_buffers(model, mesh)


def cut_up_like(model: nn.Module, param: nn.Parameter) -> None:
    """Cut a new parameter, whole on every rank, up like those of a model; a no-op for a model that is whole.

    A collective.
    """
    others: Iterator[Any] = (other for other in model.parameters() if hasattr(other, "convert_to_zero_parameters"))
    if (other := next(others, None)) is not None:
        _convert_like(other, param)


def cut_up_adapters(model: nn.Module) -> None:
    """Cut up what is whole of a model whose base is on NVMe, where the adapters must not go. A collective."""
    params = list(model.parameters())
    if any(getattr(param, "nvme_swapper", None) is not None for param in params):
        for param in params:
            if not hasattr(param, "convert_to_zero_parameters"):
                cut_up_like(model, param)


def _convert_like(other: Any, param: nn.Parameter) -> None:
    """Cut up one parameter; a trainable one is edited in place, so that its slices stay in memory."""
    swapper = other.nvme_swapper if param.requires_grad else None
    if swapper is not None:
        swapper.swappable_tensor = lambda **_: False
    try:
        other.convert_to_zero_parameters(param_list=[param])
    finally:
        if swapper is not None:
            del swapper.swappable_tensor


def forget_order(module: nn.Module) -> None:
    """Let ZeRO-3 find out anew which parameters a pass reads, after they have changed; a no-op for a whole model."""
    zero: Any = getattr(module, "optimizer", None)
    if zero is None:
        return
    zero = getattr(zero, "parameter_offload", zero)
    for part in module.modules():
        getattr(part, "_external_params", {}).clear()  # of other modules, that it was seen to read
    if not (coordinator := zero.get_param_coordinator()).is_invalid_trace():
        coordinator._invalidate_trace()


def _parameters(model: nn.Module, mesh: Mesh) -> Iterator[nn.Parameter]:
    """Every parameter, whole on the device while it is at hand; of undefined values on all but the first rank."""
    for outline in mesh.spread_object(_outlines(dict(model.named_parameters(remove_duplicate=False)))):
        if mesh.shard_rank == 0:
            param = model.get_parameter(outline.names[0])
            param.data = param.data.to(mesh.device).contiguous()
        else:
            param = nn.Parameter(
                torch.empty(outline.shape, dtype=outline.dtype, device=mesh.device),
                requires_grad=outline.requires_grad,
            )
            for owner, name in _places(model, outline):
                owner.register_parameter(name, param)
        yield param


def _spread_buffers(model: nn.Module, mesh: Mesh) -> None:
    for outline in mesh.spread_object(_outlines(dict(model.named_buffers(remove_duplicate=False)))):
        if mesh.shard_rank == 0:
            value = model.get_buffer(outline.names[0]).to(mesh.device).contiguous()
        else:
            value = torch.empty(outline.shape, dtype=outline.dtype, device=mesh.device)
        mesh.spread(value)
        for owner, name in _places(model, outline):
            owner._buffers[name] = value


def _outlines(tensors: Mapping[str, Tensor]) -> list[_Outline]:
    """The distinct tensors in the order of their first names."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    found = [(tuple(same), tensors[same[0]]) for same in names.values()]
    return [_Outline(same, tensor.shape, tensor.dtype, tensor.requires_grad) for same, tensor in found]


def _places(model: nn.Module, outline: _Outline) -> list[tuple[nn.Module, str]]:
    split = [name.rpartition(".") for name in outline.names]
    return [(model.get_submodule(prefix), name) for prefix, _, name in split]
